"""The notebook runs from top to bottom as it stands, and is kept without outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.runs import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "first_steps.ipynb"


def outputs(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


# The kernel is a child on the same machine; that it talks over unencrypted TCP there is no fault of ours.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Kernel is running:UserWarning")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = sum(
        "image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert pictures == 2
    said = "\n".join(outputs(cell) for cell in notebook.cells)
    assert "pretrained" in said
    assert "accuracy" in said


def test_the_notebook_is_kept_without_outputs() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
