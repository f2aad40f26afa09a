"""Slides of both notebooks with the outputs that are in them, slides/NAME.html: `make slides`.

A section begins a new column of slides, every other piece of prose a slide below; what answers a
prediction appears at the next key; folded boxes become speaker notes, and setup is left out.
"""

import copy
import re
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter

ROOT = Path(__file__).parents[1]
NAMES = ("Self_Supervised_Learning", "Linear_Probe")


def marked(notebook):
    """A copy whose cells say what kind of slide they are."""
    notebook, asked = copy.deepcopy(notebook), False
    for cell in notebook.cells:
        kind = "fragment" if asked else "-"  # "-": on the slide of the cell before
        if "setup" in cell.metadata.get("tags", []):
            kind = "skip"
        elif cell.source.startswith("<details"):
            kind = "notes"
        elif cell.cell_type == "markdown":
            kind = "slide" if re.match("#{1,2} ", cell.source) else "subslide"
        asked = cell.cell_type == "markdown" and "**Predict" in cell.source
        cell.metadata["slideshow"] = {"slide_type": kind}
    return notebook


def main(folder=ROOT / "slides"):
    folder.mkdir(exist_ok=True)
    # As wide as 100 columns of code; a slide that is too long can be scrolled.
    exporter = SlidesExporter(reveal_scroll=True, reveal_width="1500", reveal_height="840")
    for name in NAMES:
        text, _ = exporter.from_notebook_node(marked(nbformat.read(ROOT / f"{name}.ipynb", 4)))
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
        print(folder / f"{name}.html")


if __name__ == "__main__":
    main()
