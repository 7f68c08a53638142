"""examples/quickstart.ipynb runs from top to bottom and shows what it says."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "quickstart.ipynb"


def test_the_notebook_runs_and_the_model_learns_to_count(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [
        "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    counted = "up 7 8 9 10 11 12\ndown 7 6 5 4 3 2\ntwos 7 9 11 13 15 17\n"
    assert printed[0] != counted
    assert [text for text in printed if text == counted] == [counted] * 2
    assert sum("tensor([[" in text for text in printed) == 1
    assert (tmp_path / "gates.png").stat().st_size > 1000


def test_the_notebook_is_kept_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
