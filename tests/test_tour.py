"""The tour runs from its first cell to its last, and what it shows is committed with it."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOUR = ROOT / "docs" / "tour.ipynb"
nbformat = pytest.importorskip("nbformat", reason="nbformat and nbclient are not installed")
nbclient = pytest.importorskip("nbclient", reason="nbformat and nbclient are not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")


def kinds(notebook: Any) -> list[list[str]]:
    """What every cell of code shows: text, pages, errors."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        sorted({str(kind) for out in cell.outputs for kind in out.get("data", {"text": ""})})
        for cell in code
    ]


@pytest.mark.slow  # a kernel starts and compresses a network five times
def test_the_tour_runs_and_shows_what_is_committed(tmp_path: Path) -> None:
    committed, anew = (nbformat.read(TOUR, as_version=4) for _ in range(2))
    at = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(anew, timeout=100, resources=at).execute()
    assert kinds(anew) == kinds(committed)
    outputs = [out for cell in anew.cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
    assert {path.name for path in tmp_path.iterdir()} >= {"lenet5.pliant", "lenet5.onnx", "report"}


def test_the_tour_shows_the_report_and_no_path_of_a_machine() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    shown = kinds(notebook)
    assert all(shown) and ["text/html", "text/plain"] in shown
    text = TOUR.read_text(encoding="utf-8")
    assert not re.search(r"/home/|/tmp/|/root/|/work/", text)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run it anew from the top"


def test_links_of_the_tour_lead_somewhere() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", prose)
    assert links and not [link for link in links if not (TOUR.parent / link).exists()]
