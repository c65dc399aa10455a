"""What commands show: whole at any width, lines where there is no terminal, true hints."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pliant import zoo
from pliant.cli import app, progress
from pliant.registry import entries
from pliant.render import table
from tests import reports


@pytest.mark.parametrize("width", [40, 60, 80, 100])
@pytest.mark.parametrize("which", ["layers", "sizes", "before_after", "methods"])
def test_no_column_is_cut_in_silence(which: str, width: int) -> None:
    made = {
        "layers": lambda: table.layers(reports.resnet20()),
        "sizes": lambda: table.sizes(reports.elastic()),
        "before_after": lambda: table.before_after(reports.resnet20()),
        "methods": lambda: table.methods(entries()),
    }[which]()
    shown = io.StringIO()
    Console(file=shown, width=width).print(made)
    lines, flat = shown.getvalue().splitlines(), "".join(shown.getvalue().split())
    assert max(map(len, lines)) <= width
    for column in made.columns:
        if column.no_wrap or width <= 60:
            for cell in column.cells:
                assert "".join(str(cell).split()) in flat, (str(column.header), str(cell))


def test_without_a_terminal_every_epoch_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"phase": "search", "steps": 4, "epochs": 2, "loss": 0.5, "seconds_left": 3.0}
    with progress.Bars(quiet=False) as bars:
        bars.watch({"phase": "prepare"})
        for step in range(1, 5):
            bars.watch(row | {"step": step, "epoch": (step + 1) // 2})
        bars.watch({"phase": "measure"})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "looking at the network",
        "training with the method",
        "training with the method: epoch 1/2",
        "training with the method: epoch 2/2",
        "measuring",
    ]
    with progress.Bars(quiet=True) as bars:
        bars.watch({"phase": "prepare"})
    assert capsys.readouterr().err == ""


def test_the_zoo_is_listed() -> None:
    found = CliRunner().invoke(app, ["zoo", "--json"])
    rows = {row["network"]: row for row in json.loads(found.stdout)}
    assert set(rows) == set(zoo.NETWORKS)
    assert rows["lenet5"]["weights"] == ["mnist5k"] and rows["lenet5"]["input"] == [1, 28, 28]
    assert rows["lenet5"]["params"] == sum(p.numel() for p in zoo.build("lenet5").parameters())
    assert "resnet18-cifar-half" in CliRunner().invoke(app, ["zoo"]).stdout


def test_hints_name_only_options_that_the_command_has(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    words = ["analyze", "lenet5", "--data", "mnist5k", "--out", str(tmp_path)]
    said = CliRunner().invoke(app, words).stderr
    assert "thesis.txt" in said and "--force" not in said and "--resume" not in said
    for command in ("measure", "export"):
        more = ["--onnx", str(tmp_path / "a.onnx")] if command == "export" else []
        said = CliRunner().invoke(app, [command, "torch.nn:Identity", *more]).stderr
        assert "--input" in said and "--data" not in said


def test_python_m_pliant() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pliant", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("pliant ")
