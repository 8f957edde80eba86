"""Executed notebooks in the forms that are kept: `python -m tools.notebooks FILE ...` stores them, in place.

A stored notebook has no progress bar, its figures have 256 colours, and opening it changes nothing.
"""

from __future__ import annotations

import base64
import io
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

PARTS = Path(__file__).parent / "pages"
LEFT_OUT = "Images of the data set are left out of what is published; your own run shows them."
SHOWS_DATA = "shows-data"  # a cell's tag: its pictures are a data set's
WIDGET = "application/vnd.jupyter.widget-view+json"


def render(template: str, **values: Any) -> bytes:
    """A page from tools/pages, all of whose text is escaped."""
    jinja = Environment(loader=FileSystemLoader(PARTS), autoescape=True, undefined=StrictUndefined)
    css = (PARTS / "page.css").read_text(encoding="utf-8")
    return jinja.get_template(template).render(css=css, **values).encode("utf-8", "backslashreplace")


def without_data(nb: Any) -> Any:
    """The notebook without the pictures of cells tagged `shows-data`, in whose place a line says so."""
    for cell in nb.cells:
        if cell.cell_type == "code" and SHOWS_DATA in cell.metadata.get("tags", []):
            for output in cell.outputs:
                data = output.get("data", {})
                if any(kind.startswith("image/") for kind in data):
                    output.data = {"text/plain": LEFT_OUT}
    return nb


def as_page(nb: Any) -> bytes:
    """An executed notebook as a page that asks nothing of another machine and runs nothing."""
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    heads = [line for cell in nb.cells for line in cell.source.splitlines() if line.startswith("# ")]
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)", "", cell.source)  # badges
            cell.source = re.sub(r"\((\d\d_\w+)\.ipynb\)", r"(\1.html)", cell.source)
    exporter = HTMLExporter(template_name="basic")  # the page's own policy lets no script in it run
    exporter.log.setLevel("ERROR")  # or it misses an alternative text at every figure
    body, _ = exporter.from_notebook_node(nb)
    body = '<p><a href="../index.html">← the run</a></p>' + body
    style = "<style>" + HtmlFormatter().get_style_defs(".highlight") + "</style>"
    return render("page.html.j2", title=heads[0][2:] if heads else "notebook", body=style + body)


def stored(nb: Any) -> Any:
    """The notebook as it is stored: without widgets, of which only a running kernel knows, and small."""
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = with_palette(output.data["image/png"])
    return nb


def with_palette(png: str) -> str:
    """A picture, in base64, in 256 colours and with its resolution; as it was where that saves nothing."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        small, file = image.convert("RGB").quantize(256, dither=Image.Dither.NONE), io.BytesIO()
        small.save(file, "png", optimize=True, **{"dpi": image.info["dpi"]} if "dpi" in image.info else {})
    text = base64.b64encode(file.getvalue()).decode()
    return min(text, "".join(png.split()), key=len)


def published_form(nb: Any, paths: dict[str, str]) -> Any:
    """The notebook as it is published: `stored`, without a data set's pictures and a machine's paths.

    paths: {a path of this machine: what stands in its place}.
    """
    nb = without_data(stored(nb))
    run = nb.metadata.get("papermill", {})
    nb.metadata["papermill"] = {name: run.get(name) for name in ("duration", "end_time", "exception")}
    text = nbformat.writes(nb)
    for path, word in paths.items():
        text = text.replace(path, word)
    return nbformat.reads(text, as_version=4)


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        file.write_text(nbformat.writes(stored(nbformat.read(file, as_version=4))) + "\n", encoding="utf-8")
