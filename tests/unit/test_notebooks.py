"""The notebooks of docs/: what is stored in them is small and clean, and they run from nothing, without a network."""

import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "docs" / "notebooks" / "quickstart.ipynb"


def texts_of(notebook):
    """What the code cells have printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def pictures_of(notebook):
    """Number of pictures that the code cells have shown."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_stored_outputs_are_small_and_name_no_machine():
    text = QUICKSTART.read_text(encoding="utf-8")
    notebook = nbformat.read(QUICKSTART, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < 100_000
    assert pictures_of(notebook) == 1
    assert not any(root in texts_of(notebook) for root in ("/home/", "/root/", "/tmp/", "/work/", "/Users/"))
    assert [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"] == list(range(1, 8))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_quick_start_runs(tmp_path, monkeypatch):
    """On made-up bodies; `mim_inspect` is found where Python is."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    notebook = nbformat.read(QUICKSTART, as_version=4)
    stored = texts_of(notebook)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    found = texts_of(notebook)
    assert "nearest fine scan: [0, 1, 2, 3]" in found, "every body is found again in its other scan"
    assert [line.split()[:1] for line in found.splitlines()] == [line.split()[:1] for line in stored.splitlines()]
    assert pictures_of(notebook) == 1
    assert (tmp_path / "quickstart" / "looks" / "report.html").is_file()
