"""A sweep is one study: its cases are made once each, whoever dies and whoever helps."""

import importlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pliant import zoo
from pliant.api.sweep import Case, cases, open_study, rows, sweep
from pliant.cli import app
from pliant.cli.runs import slug
from pliant.data import Data, Train
from pliant.errors import MethodError, OutputError, TrainingError

DATA = torch.linspace(-1, 1, 80 * 16).reshape(80, 16), torch.arange(80) % 4


def small(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    parts = torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)
    return torch.nn.Sequential(*parts)


WORKER = """
import sys, time
import torch
from pliant import sweep
from pliant.api.sweep import cases

def keep(case, result):
    print(case, flush=True)
    time.sleep(0.15)
    return str(case)

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
data = torch.randn(80, 16), torch.arange(80) % 4
plan = cases(["energy", "magnitude"], ["params=0.8", "params=0.6"], range(3))
sweep(net, data, plan, storage=sys.argv[1], keep=keep)
"""


def test_cases_are_all_combinations() -> None:
    made = cases(["energy", "nrmf(alpha=0.1)"], ["params=0.5"], (0, 1), {"p": (0.8, 0.9)})
    assert [str(case) for case in made][:3] == [
        "energy(p=0.8), params=0.5, seed 0",
        "energy(p=0.8), params=0.5, seed 1",
        "energy(p=0.9), params=0.5, seed 0",
    ]
    assert len(made) == 6
    with pytest.raises(MethodError, match="nrmff"):
        cases(["nrmff"])


def test_every_case_is_made_once_and_refusals_are_kept(tmp_path: Path, mnist5k: Data) -> None:
    net = zoo.build("lenet5", weights="mnist5k")
    plan = cases(["energy"], ["params=0.8", "params=0.0001"])
    told: list[dict[str, float]] = []
    found = sweep(net, mnist5k, plan, storage=tmp_path / "study.db", watch=told.append)
    good, refused = sorted(found, key=lambda row: "refused" in row)
    assert good["met"] and good["params"] < 50_000 and good["accuracy"] > 0.9
    assert "cannot be met" in refused["refused"]
    assert [row["step"] for row in told] == [1, 2] and told[-1]["seconds_left"] == 0
    again = sweep(net, mnist5k, plan, storage=tmp_path / "study.db", watch=told.append)
    assert again == found and len(told) == 2


def test_who_was_taken_for_dead_goes_on(
    tmp_path: Path, mnist5k: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process ended the trial, and the case waits again: it is made once."""
    optuna = pytest.importorskip("optuna")
    net, optimize = zoo.build("lenet5", weights="mnist5k"), optuna.study.Study.optimize
    late = [
        optuna.exceptions.UpdateFinishedTrialError("Trial#0 has already finished"),
        ValueError("Cannot tell a COMPLETE trial."),
    ]

    def slow(study: Any, make: Any, **how: Any) -> None:
        if late:
            raise late.pop()
        optimize(study, make, **how)

    monkeypatch.setattr(optuna.study.Study, "optimize", slow)
    told: list[dict[str, float]] = []
    plan = cases(["energy"], ["params=0.8"])
    found = sweep(net, mnist5k, plan, storage=tmp_path / "study.db", watch=told.append)
    assert len(found) == 1 and found[0]["met"] and [row["step"] for row in told] == [1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sweep_survives_kills_and_is_shared(tmp_path: Path) -> None:
    """12 cases; one process is killed twice within a case, then two go on together."""
    storage = str(tmp_path / "study.db")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    (tmp_path / "worker.py").write_text(
        # Signs of life every second, so that the test need not wait long for the dead.
        "import pliant.api.sweep as s\ns.ALIVE = 1\n" + WORKER
    )

    def begin() -> subprocess.Popen[bytes]:
        command = [sys.executable, str(tmp_path / "worker.py"), storage]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)

    for made in (2, 3):
        worker = begin()
        assert worker.stdout is not None and all(worker.stdout.readline() for _ in range(made))
        worker.kill()
        worker.communicate()
    pair = begin(), begin()
    try:
        assert [worker.wait(timeout=240) for worker in pair] == [0, 0]
    finally:
        for worker in pair:
            worker.kill()
    study = open_study(storage)
    done = [t for t in study.get_trials() if t.state.name == "COMPLETE"]
    counts = Counter(str(Case(**trial.user_attrs["case"])) for trial in done)
    assert len(counts) == 12 and set(counts.values()) == {1}
    assert len(rows(study)) == 12


def test_the_command_writes_runs_and_pages(tmp_path: Path) -> None:
    run, out = CliRunner().invoke, tmp_path / "sweep"
    asked = ["lenet5", "--weights", "mnist5k", "--data", "mnist5k", "--method", "energy"]
    asked += ["--budget", "params=0.8", "--budget", "params=0.6", "--option", "samples=0,64"]
    done = run(app, ["sweep", *asked, "--out", str(out)])
    assert done.exit_code == 0, done.output
    page = (out / "sweep.html").read_text()
    assert page.count("report.html") == 4 and "Download as CSV" in page
    runs = sorted(path for path in out.iterdir() if path.is_dir())
    assert len(runs) == 4 and all((path / "model.pliant").exists() for path in runs)
    listed = run(app, ["runs", str(out)])
    assert listed.exit_code == 0 and (out / "runs.html").read_text().count("report.html") == 4
    page = str(tmp_path / "pair.html")
    both = run(app, ["compare", str(runs[0]), str(runs[1]), "--out", page])
    assert both.exit_code == 0 and "What each layer became" in Path(page).read_text()
    again = run(app, ["compare", str(runs[0]), str(runs[1]), "--out", page])
    assert again.exit_code == 2 and "--force" in again.output


def test_mistakes_of_the_commands_are_sentences(tmp_path: Path) -> None:
    run = CliRunner().invoke
    for asked, message in (
        (["runs", str(tmp_path)], "no report.json"),
        (["compare", str(tmp_path)], "two runs or more"),
        (
            ["sweep", "lenet5", "--data", "mnist5k", "--method", "energy", "--option", "p"],
            "name=value",
        ),
    ):
        done = run(app, asked)
        assert done.exit_code == 2 and message in done.output.replace("\n", " ")


def test_a_case_whose_process_died_at_once_is_taken_again(
    tmp_path: Path, mnist5k: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken, and gave no sign of life: nobody else would ever finish it."""
    monkeypatch.setattr(importlib.import_module("pliant.api.sweep"), "ALIVE", 0.1)
    plan = cases(["energy"], ["params=0.8"])
    study = open_study(tmp_path / "study.db")
    study.enqueue_trial({}, user_attrs={"case": vars(plan[0])})
    study.ask()
    net = zoo.build("lenet5", weights="mnist5k")
    found = sweep(net, mnist5k, plan, storage=tmp_path / "study.db")
    assert len(found) == 1 and found[0]["met"]


class Stopped(Exception):
    """What a mistake of the user's own raises."""


def test_a_case_that_was_stopped_is_made_when_the_sweep_is_run_again(tmp_path: Path) -> None:
    """Stopped by hand, by a full disk, or by a mistake: none is left out in silence."""
    plan, place = cases(["energy"], ["params=0.8"]), tmp_path / "study.db"
    for kind in (KeyboardInterrupt, OutputError, Stopped):

        def stop(case: Case, result: object, kind: type[BaseException] = kind) -> None:
            raise kind("stopped here")

        with pytest.raises(kind):
            sweep(small(), DATA, plan, storage=place, keep=stop)
    assert [row["met"] for row in sweep(small(), DATA, plan, storage=place)] == [True]


def test_a_mistake_is_kept_with_its_reason_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("pliant.api.sweep")
    made, plan, place = module.once, cases(["energy"], ["params=0.8"]), tmp_path / "study.db"

    def wrong(*args: Any, **told: Any) -> None:
        raise Stopped("a mistake")

    monkeypatch.setattr(module, "once", wrong)
    (row,) = sweep(small(), DATA, plan, storage=place)
    assert row["refused"] == "Stopped: a mistake" and "params" not in row
    monkeypatch.setattr(module, "once", made)
    (row,) = sweep(small(), DATA, plan, storage=place)
    assert row["met"] and "refused" not in row


def test_a_study_answers_no_other_question(tmp_path: Path) -> None:
    """Numbers of another network, other data or another training are not taken for its own."""
    plan, place = cases(["energy"], ["params=0.8"]), tmp_path / "study.db"
    sweep(small(), DATA, plan, storage=place)
    labels = DATA[1].flip(0)
    for net, data, asked, said in (
        (small(1), DATA, {}, "weights"),
        (small(), (DATA[0] + 1, DATA[1]), {}, "inputs"),
        (small(), (DATA[0], labels), {}, "labels"),
        (small(), Data(train=DATA, test=(DATA[0], labels)), {}, "inputs"),
        (small(), DATA, {"train": Train(epochs=1)}, "training is none, here it is epochs=1"),
        (small(), DATA, {"target": "torch"}, "target"),
        (small(), DATA, {"task": "none"}, "task"),
    ):
        with pytest.raises(TrainingError, match=said):
            sweep(net, data, plan, storage=place, **asked)
    assert len(sweep(small(), DATA, plan, storage=place)) == 1
    with pytest.raises(OutputError, match="cannot be opened"):
        sweep(small(), DATA, plan, storage=Path("/proc/none/study.db"))


def test_folders_of_two_cases_are_two(tmp_path: Path) -> None:
    """Also where their names differ only in what no folder is called, or far behind."""
    many = ", ".join(f"'layer{number}'" for number in range(30))
    named = [f"nrmf(only=({text},))" for text in ("'a*'", "'a?'", "'A?'", many, f"{many}, 'b'")]
    slugs = {slug(Case(text)).lower() for text in named}
    assert len(slugs) == 5 and all(len(text) < 140 for text in slugs)
    assert slug(Case("energy(p=0.8)", "params=0.5")) == "energy-p=0.8-params=0.5-seed-0"


def test_a_case_that_is_put_back_at_the_last_moment_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits, and the look at what still runs puts a case of the dead back: not the end."""
    module = importlib.import_module("pliant.api.sweep")
    dead = iter([False, True])
    monkeypatch.setattr(module, "_stillborn", lambda t: t.number == 0 and next(dead, False))
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    plan = cases(["energy"], ["params=0.8"])
    study = open_study(tmp_path / "study.db")
    study.enqueue_trial({}, user_attrs={"case": vars(plan[0])})
    study.ask()
    assert len(sweep(small(), DATA, plan, storage=tmp_path / "study.db")) == 1
