"""Write the repository's address where Colab and Kaggle need it.

    make colab REPOSITORY=https://github.com/OWNER/NAME

The first cell of each notebook then clones it where the modules are not beside the notebook. If it
is on GitHub, README and notebooks get badges that open them there. Without an address all of it is
taken out again.
"""

import pathlib
import re
import sys

import nbformat

ROOT = pathlib.Path(__file__).parents[1]
BADGES = {"Colab": ("https://colab.research.google.com/assets/colab-badge.svg",
                    "https://colab.research.google.com/github/{}/blob/main/{}"),
          "Kaggle": ("https://kaggle.com/static/images/open-in-kaggle.svg",
                     "https://kaggle.com/kernels/welcome?src=https://github.com/{}/blob/main/{}")}


def badges(address, name):
    """Links that open a notebook on each service, as Markdown; empty if it is not on GitHub."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", address)
    if not found:
        return ""
    return " ".join(f"[![Open in {service}]({image})]({link.format(found[1], name)})"
                    for service, (image, link) in BADGES.items())


def set_address(notebook, address):
    """Set REPOSITORY in a notebook's first code cell."""
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.source = re.sub(r'^REPOSITORY = ".*?"', f'REPOSITORY = "{address}"', cell.source,
                         flags=re.MULTILINE)


def write_notebook(path, address):
    """Write the address and, at the top of the first cell, the badges."""
    notebook = nbformat.read(path, as_version=4)
    set_address(notebook, address)
    title = re.sub(r"^\[!\[.*\n\n", "", notebook.cells[0].source)
    notebook.cells[0].source = "\n\n".join(filter(None, [badges(address, path.name), title]))
    nbformat.write(notebook, path)


def main(address, root=ROOT):
    """Write the address into both notebooks, and badges below the README's mark."""
    lines = ["<!-- badges -->"]
    for path in sorted(root.glob("*.ipynb"), reverse=True):  # in the order of the README
        write_notebook(path, address)
        if links := badges(address, path.name):
            lines.append(f"- `{path.name}` {links}")
    text = (root / "README.md").read_text("utf-8")
    text = re.sub(r"<!-- badges -->\n(- .*\n)*", "\n".join([*lines, ""]), text)
    (root / "README.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:2] or [""])
