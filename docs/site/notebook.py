"""A notebook as a page: its text and code in order; its pictures are for those who run it."""

from __future__ import annotations

import json
from pathlib import Path


def as_markdown(path: Path) -> str:
    """The cells of a notebook as Markdown."""
    cells = json.loads(path.read_text())["cells"]
    sources = ((cell["cell_type"], "".join(cell["source"])) for cell in cells)
    parts = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in sources]
    return "\n\n".join([*parts, ""])
