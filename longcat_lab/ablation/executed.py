"""An executed notebook as a file: what tells one state of it from another, and how it is held to its size."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from longcat_lab.files import read_json, write_whole

if TYPE_CHECKING:
    from nbformat import NotebookNode

LARGEST = 1_000_000  # bytes of a job's executed notebook, and of its page
SMALL = 2000  # characters of an output that is never cut
ENDS = 5000  # characters that stay of a print's start, and of its end


def digest(path: Path) -> str:
    """What tells one state of a notebook from another, wherever the folder is copied to."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def source(notebook: Path) -> str:
    """What tells one state of a notebook from another by what its cells compute: outputs, text and metadata are no part of it."""
    cells = (read_json(notebook) or {}).get("cells") or []
    code = ["".join(cell.get("source") or "") for cell in cells if cell.get("cell_type") == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def hold(path: Path, largest: int = LARGEST) -> None:
    """Cuts the largest outputs of the notebook at `path` until it is within `largest` bytes; a sentence stands for what is cut.

    Prints keep their start and end. A file that is no notebook stays as it is.
    """
    import nbformat

    if not path.is_file() or path.stat().st_size <= largest:
        return
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception:  # a half-written file has many ways to be none; its job's fate is told elsewhere
        return
    where = f"a job's notebook is held to {largest / 1e6:g} MB; what is large belongs into a file"
    _join_prints(notebook)
    while len((text := nbformat.writes(notebook)).encode()) > largest and cut_largest(notebook, where):
        pass
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def cut_largest(notebook: NotebookNode, where: str) -> bool:
    """Cut the notebook's largest output, with a sentence that ends in `where`; False where none is large."""
    outputs = [(len(str(output)), cell, i) for cell in notebook.cells for i, output in enumerate(cell.get("outputs", []))]
    size, cell, i = max(outputs, key=lambda each: each[0], default=(0, None, 0))
    if cell is None or size < SMALL:
        return False
    from nbformat.v4 import new_output

    output = cell.outputs[i]
    said = f"An output of {size:,} characters is left out here: {where}.\n"
    if output.output_type == "stream" and len(output.text) > 3 * ENDS:
        left = len(output.text) - 2 * ENDS
        said = f"{output.text[:ENDS]}\n… {left:,} characters of what was printed are left out here: {where}. …\n{output.text[-ENDS:]}"
    cell.outputs[i] = new_output("stream", name=output.get("name", "stdout"), text=said)
    return True


def _join_prints(notebook: NotebookNode) -> None:
    """One output for what a cell printed in many pieces, each too small to be cut."""
    for cell in notebook.cells:
        joined: list[NotebookNode] = []
        for output in cell.get("outputs", []):
            if joined and output.output_type == joined[-1].output_type == "stream" and output.name == joined[-1].name:
                joined[-1].text += output.text
            else:
                joined.append(output)
        if "outputs" in cell:
            cell.outputs = joined
