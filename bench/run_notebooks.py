"""Execute the notebooks from top to bottom and keep their outputs: `make notebooks` (or name some: python bench/run_notebooks.py A.ipynb).

What would change with every run or shows nothing on a web page is left out: execution times, and the live sliders, beside each of
which stands a picture.
"""

import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
LIVE = "application/vnd.jupyter.widget-view+json"


def stripped(notebook):
    """The notebook without execution times, live sliders and the addresses of figures."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"]["text/plain"] = "<Figure>"
                output["metadata"] = {}
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if LIVE not in output.get("data", {})]
    return notebook


for path in [pathlib.Path(name) for name in sys.argv[1:]] or sorted(ROOT.glob("*.ipynb")):
    start, notebook = time.perf_counter(), nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    nbformat.write(stripped(notebook), path)
    print(f"{path.name}: {(time.perf_counter() - start) / 60:.1f} min, {path.stat().st_size / 1e6:.1f} MB")
