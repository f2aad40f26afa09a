"""Execute the notebooks from top to bottom and keep their outputs.

    python bench/run_notebooks.py                         both, in course order (`make notebooks`)
    python bench/run_notebooks.py Linear_Probe.ipynb      one
    python bench/run_notebooks.py --alone                 both as on Colab: each alone in an empty
                                                          folder, where its first cell clones the
                                                          last commit; keeps nothing

Outputs that would differ in every run or that a web page cannot show are left out: execution times,
intermediate states of progress bars, and live sliders, next to each of which stands a figure.
"""

import base64
import io
import pathlib
import re
import sys
import tempfile
import time

import nbformat
from colab import set_address
from nbclient import NotebookClient
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
LIVE = "application/vnd.jupyter.widget-view+json"


def merged(outputs):
    """Outputs with consecutive pieces of a stream joined, and of a progress bar only its end."""
    kept = []
    for output in outputs:
        if LIVE in output.get("data", {}):
            continue
        if output.output_type == "stream" and kept and output.name == kept[-1].get("name"):
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":  # \r returns to the start of the line
            output.text = re.sub(r"[^\n]*\r(?!\n)(?=[^\n])", "", output.text)
    return [output for output in kept if output.output_type != "stream" or output.text.strip()]


def lighter(png):
    """A figure, PNG in base64, in 256 colors: a third of its size, the same to the eye."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image = image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(small := io.BytesIO(), "PNG", optimize=True)
    return min(base64.b64encode(small.getvalue()).decode(), png, key=len)


def stripped(notebook):
    """The notebook without execution times, live sliders and the addresses of figures, which become
    lighter."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = merged(cell.outputs)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"]["text/plain"] = "<Figure>"
                output["data"]["image/png"] = lighter(output["data"]["image/png"])
                output["metadata"] = {}
    return notebook


def main(paths, alone=False):
    """Execute each notebook in the repository's root and write it back, or in an empty folder."""
    for path in paths:
        start, notebook = time.perf_counter(), nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as empty:
            if alone:
                set_address(notebook, ROOT.as_uri())
            place = {"metadata": {"path": empty if alone else str(ROOT)}}
            NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=place).execute()
        if not alone:
            nbformat.write(stripped(notebook), path)
        minutes, size = (time.perf_counter() - start) / 60, path.stat().st_size / 1e6
        print(f"{path.name}: {minutes:.1f} min, {size:.1f} MB")


if __name__ == "__main__":
    named = [pathlib.Path(name) for name in sys.argv[1:] if name != "--alone"]
    course = sorted(ROOT.glob("*.ipynb"), reverse=True)  # the second uses what the first trained
    main(named or course, "--alone" in sys.argv)
