"""The benches' own machinery: claims, resuming, the generated page. Nothing real is trained."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from bench import data as bench_data
from bench import experiments, history, page, peers, run, tasks
from bench.cells import Store, measure_all
from bench.claim import STATES, claim, counted, judged, misses_first
from bench.compress import Observed, compress
from bench.experiments import (
    Cell,
    Experiment,
    by_seed,
    calibration,
    factorize,
    lowrank,
    paired,
    step_time,
)
from bench.experiments import peers as beside
from bench.result import assemble, read_all
from bench.tasks import Task
from pliant import zoo
from pliant.budget import Budget
from pliant.data import Data, Train
from pliant.drivers.loop import fit
from pliant.errors import BudgetError, DataError, PliantError
from pliant.registry import build
from pliant.run import start

NAMES = experiments.names()


# ---------------------------------------------------------------- what is committed


def test_the_page_is_what_the_results_say() -> None:
    assert page.PATH.read_text() == page.render(read_all()), "run python -m bench readme"


@pytest.mark.parametrize("result", read_all(), ids=lambda result: result["bench"])
def test_a_result_holds_the_claims_and_means_of_its_own_cells(result: dict[str, Any]) -> None:
    code, settings = experiments.code(result["settings"]), result["settings"]
    assert not result["quick"]
    assert result["claims"] == code.claims(settings, result["cells"])
    assert result["summary"] == json.loads(json.dumps(code.summary(settings, result["cells"])))


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_settings_build_every_cell_once(name: str, quick: bool) -> None:
    experiment = experiments.load(name, quick=quick)
    cells = experiment.code.cells(experiment.settings)
    assert cells and len({json.dumps(cell.key) for cell in cells}) == len(cells)
    claims = experiment.code.claims(experiment.settings, [])
    assert claims and not any(row["holds"] for row in claims), "nothing measured, nothing holds"


def test_all_of_the_first_seed_comes_first() -> None:
    experiment = experiments.load("resnet20-lowrank")
    seeds = [c.key["seed"] for c in lowrank.cells(experiment.settings) if "seed" in c.key]
    assert seeds == sorted(seeds) and len(set(seeds)) == 3


def test_all_rivals_share_one_checkpoint() -> None:
    experiment = experiments.load("resnet20-lowrank")
    cells = lowrank.cells(experiment.settings)
    assert len({tasks.base_path(cell.plan) for cell in cells}) == 1
    quick = experiments.load("resnet20-lowrank", quick=True)
    other = lowrank.cells(quick.settings)[0]
    assert tasks.base_path(other.plan) != tasks.base_path(cells[0].plan)


# ---------------------------------------------------------------- claims


def measured(rival: str, budget: float | None, seed: int, **values: Any) -> dict[str, Any]:
    key = {"rival": rival, "budget": budget, "seed": seed}
    return {"key": key, "values": {"params": 25, **values}}


SETTINGS: dict[str, Any] = {
    "budgets": [0.25],
    "seeds": [0, 1],
    "rivals": {"ours": "nrmf", "theirs": "energy"},
    "claims": {
        "champion": "ours",
        "rivals": ["theirs"],
        "order": ["ours", "theirs"],
        "gap_to_dense": {"0.25": 1.0},
        "smaller_than": "theirs",
    },
}


def lowrank_cells() -> list[dict[str, Any]]:
    rows = [{"key": {"rival": "base"}, "values": {"accuracy": 0.9, "params": 100}}]
    for seed, (ours, theirs) in enumerate([(0.89, 0.87), (0.90, 0.88), (0.88, 0.8595)]):
        rows.append(measured("dense", None, seed, accuracy=0.90, params=100))
        rows.append(measured("ours", 0.25, seed, accuracy=ours, accuracy_before=0.5, params=24.8))
        rows.append(measured("theirs", 0.25, seed, accuracy=theirs, accuracy_before=0.6))
    return rows


def by_text(cells: list[dict[str, Any]]) -> Callable[[str], dict[str, Any]]:
    claims = lowrank.claims(SETTINGS, cells)

    def find(words: str) -> dict[str, Any]:
        (row,) = [row for row in claims if words in row["claim"]]
        return row

    return find


def test_claims_are_computed_from_cells() -> None:
    find = by_text(lowrank_cells())
    lead = find("ours leads theirs at 25% of the parameters, at the end")
    assert lead["value"] == 2.01667 and lead["error"] == 0.01667, "pairs, not means, are compared"
    assert lead["state"] == "holds" and lead["seeds"] == 3
    gap = find("within 1.0 of the dense")
    assert gap["value"] == 1.0 and gap["state"] == "not measured"
    assert find("0.99 times those of theirs")["holds"]
    before = find("before fine-tuning")
    assert before["state"] == "misses" and before["value"] == -10.0
    assert find("equal parameters")["holds"] and find("more parameters than")["value"] == 1.0


def test_a_refused_or_missing_cell_holds_no_claim() -> None:
    cells = [c for c in lowrank_cells() if c["key"]["rival"] != "ours"]
    refused = {"key": {"rival": "ours", "budget": 0.25, "seed": 0}, "values": {}, "refused": "no"}
    find = by_text([*cells, refused])
    for words in ("at the end", "within 1.0", "fewer parameters", "before fine-tuning"):
        assert find(words)["value"] is None and find(words)["state"] == "not measured"
    assert "refused" in str(lowrank.tables(SETTINGS, [*cells, refused])[0].rows)


def test_one_seed_and_what_is_within_two_standard_errors_are_not_measured() -> None:
    assert judged("a", [5.0], ">", 0, "points")["state"] == "not measured"
    near = judged("a", [0.0, 1.0, 2.0], ">", 0, "points")  # 1 with a standard error of 0.577
    assert near == {**near, "value": 1.0, "error": 0.57735, "state": "not measured"}
    assert judged("a", [0.5, 1.0, 1.5], ">", 0, "points")["state"] == "holds"
    assert judged("a", [-0.5, -1.0, -1.5], ">", 0, "points")["state"] == "misses"
    assert judged("a", [0.0, 0.0], ">", 0, "points")["state"] == "misses"
    assert judged("a", [0.0, 0.0], ">=", 0, "points")["state"] == "holds"
    assert judged("a", [], ">=", 0, "points")["state"] == "not measured"


def test_seeds_that_both_have_are_compared() -> None:
    cells = [measured("a", 0.5, seed, accuracy=0.5 + seed / 10) for seed in range(3)]
    cells += [measured("b", 0.5, seed, accuracy=0.4) for seed in (2, 0)]
    cells += [{"key": {"rival": "fixed"}, "values": {"accuracy": 0.1}}]
    one, two, fixed = (by_seed(cells, "accuracy", rival=name) for name in ("a", "b", "fixed"))
    assert paired(one, two, 100) == [10.0, 30.0]
    assert paired(one, fixed) == [0.4, 0.5, 0.6]


def test_dense_networks_that_were_scored_as_they_came_are_named() -> None:
    text = "**Scored as they came**"
    (result,) = (r for r in read_all() if r["bench"] == "prune-family")
    assert text in page.render([result])
    fair = {**result, "settings": {**result["settings"], "fair": True}}
    assert text not in page.render([fair])
    assert not any(text in page.render([r]) for r in read_all() if r["bench"] == "orion")


def test_a_changed_plan_is_named() -> None:
    old = {"seeds": [0, 1], "budgets": [0.1, 0.2], "lr": 1, "claims": {"gap": 1.0}, "quick": {}}
    new = {"seeds": [1, 0], "budgets": [0.2], "lr": 2, "claims": {"gap": 2.0, "more": 1}}
    found = history.changes(old, new)
    assert history.said(found) == (
        "budgets 0.1, 0.2 → 0.2; claims.gap 1.0 → 2.0; claims.more none → 1"
    )
    (result,) = (r for r in read_all() if r["bench"] == "lenet-scratch")
    text = page.render([result])
    assert "budgets 0.02, 0.05 → 0.05" in text and "seeds 0, 1, 2 → 0, 1" in text
    result["settings"] = {**result["settings"], "seeds": [0, 1, 7]}
    assert "Planned otherwise since this result**: seeds 0, 1, 7 → 0, 1" in page.render([result])


@pytest.mark.parametrize("result", read_all(), ids=lambda result: result["bench"])
def test_what_a_result_says_of_its_plan_is_what_git_says(result: dict[str, Any]) -> None:
    found = history.since_planned(result["bench"], result["settings"])
    if found is None:
        pytest.skip("no history here")
    kept = ("what", "planned", "measured")
    assert [[row[k] for k in kept] for row in found] == [
        [row[k] for k in kept] for row in result["changed"]
    ]


def test_unequal_parameters_are_noticed() -> None:
    cells = lowrank_cells()
    cells[2]["values"]["params"] = 26
    find = by_text(cells)
    assert not find("more parameters than")["holds"] and not find("equal parameters")["holds"]


def test_misses_come_first_and_none_is_left_out() -> None:
    good, bad = claim("a", 1.0, "<=", 1.001, "x"), claim("b", 1.0015, "<=", 1.001, "x")
    rows = misses_first(
        [{"bench": "one", "claims": [good, bad]}, {"bench": "two", "claims": [bad]}]
    )
    assert [(row["bench"], row["holds"]) for row in rows] == [
        ("one", False),
        ("two", False),
        ("one", True),
    ]
    assert claim("c", None, ">=", 1, "x")["holds"] is False
    assert counted([good, bad, claim("c", None, ">=", 1, "x")]) == (
        "1 of 3 claims hold, 1 miss and 1 are not measured"
    )


def test_other_claims() -> None:
    times = {"seconds_pliant": 1.0, "seconds_tensorly": 6.0}
    errors = {"error_pliant": 1.0005, "error_tensorly": 1.0}
    settings = experiments.load("factorize").settings
    cells = [{"key": cell.key, "values": times | errors} for cell in factorize.cells(settings)]
    assert all(row["holds"] for row in factorize.claims(settings, cells))
    assert not any(row["holds"] for row in factorize.claims(settings, cells[:1]))
    settings = experiments.load("step-time").settings
    values = {"ratio_nrmf": 1.06, "ratio_naive": 3.0, "ms_plain": 1.0}
    cells = [{"key": cell.key, "values": values} for cell in step_time.cells(settings)]
    assert [row["holds"] for row in step_time.claims(settings, cells)] == [False, True] * 2
    settings = experiments.load("calibration").settings
    cells = [
        {"key": c.key, "values": {"accuracy": 0.8 + 0.05 * (c.key["rival"] in ("dense", "all"))}}
        for c in calibration.cells(settings)
    ]
    found = calibration.claims(settings, cells)
    assert {row["state"] for row in found} == {"not measured"}, "one seed"
    again = [{**c, "key": {**c["key"], "seed": 1}} for c in cells if "seed" in c["key"]]
    assert all(row["holds"] for row in calibration.claims(settings, cells + again))


def test_peers_are_made_just_faster_and_just_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(dense: Any, data: Any, knob: float) -> float:
        if knob < 0.1:
            raise BudgetError("too small")
        return 5 * knob

    made = {
        "even": lambda *a: 2.5 * a[-1],
        "refusing": refusing,
        "slow": lambda *a: 200 * a[-1],
        "fast": lambda *a: a[-1] / 2,
    }
    monkeypatch.setattr(peers, "PEERS", made)
    found = peers.around(nn.Identity(), None, list, [8, 8])  # type: ignore[arg-type]
    for name, exact in {"even": 0.4, "refusing": 0.2}.items():
        below, above = found[name]
        assert below <= exact < above < 1.1 * below
    assert found["slow"] == (None, peers.LEAST)
    below, above = found["fast"]
    assert below > 0.9 and above is None


def test_ours_lead_peers_that_had_as_much_time() -> None:
    settings = experiments.load("peers").settings
    sides = {"faster": (0.7, 0.38), "slower": (0.72, 0.42)}

    def values(ours: str, **changed: dict[str, float]) -> list[list[float | None]]:
        rivals = {
            f"{name}, {side}": {"accuracy": accuracy, "share": share}
            for name in peers.PEERS
            for side, (accuracy, share) in sides.items()
        }
        rivals |= {"nrmf": {"accuracy": 0.8, "share": 0.4}}
        rivals |= {"group_fisher": {"accuracy": 0.75, "share": 0.3}}
        rivals = {n: row for n, row in (rivals | changed).items() if row}
        rows = [{"key": c.key, "values": {"rivals": rivals}} for c in beside.cells(settings)]
        found = [row for row in beside.claims(settings, rows) if "kim" in row["claim"]]
        found = [row for row in found if f": {ours} " in row["claim"]]
        return [
            [row["value"] for row in found if what in row["claim"]]
            for what in ("leads kim, slower", "leads kim, faster", "has no more time")
        ]

    assert values("nrmf") == [[8.0] * 2, [10.0] * 2, [1.05] * 2], "two tasks"
    assert values("group_fisher") == [[3.0] * 2, [5.0] * 2, [1.4] * 2]
    late = {"accuracy": 0.8, "share": 0.5}
    assert values("nrmf", nrmf=late)[2] == [0.84] * 2
    assert values("nrmf", nrmf={}) == [[None] * 2] * 3, "it was refused"
    gone = values("nrmf", **{"kim, slower": {}})
    assert gone[0] == gone[2] == [None] * 2, "then equal times are not shown"


# ---------------------------------------------------------------- running and resuming


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tasks, "WORK", tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def fake(work: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An experiment of three cells that counts what it measures."""
    seen: list[int] = []
    code = SimpleNamespace(seen=seen, broken=set(), refusing=set(), version=0)

    def measure(cell: Cell, watch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        number = cell.key["seed"]
        if number in code.broken:
            raise RuntimeError("a bug")
        if number in code.refusing:
            raise PliantError("too small")
        seen.append(number)
        return {"accuracy": number / 10}

    code.measure = measure
    code.cells = lambda settings: [
        Cell({"rival": "x", "seed": n}, {"version": code.version}) for n in range(3)
    ]
    code.claims = lambda settings, cells: [claim("three", len(cells), ">=", 3, "cells")]
    code.summary = lambda settings, cells: []
    code.tables = lambda settings, cells: []
    monkeypatch.setattr(experiments, "code", lambda settings: code)
    return code


def go(quick: bool = False) -> tuple[Any, list[str]]:
    experiment = Experiment("fake", {"title": "Fake", "about": "", "experiment": "fake"}, quick)
    ignore: Callable[..., None] = lambda *args: None  # noqa: E731
    cells, failed = measure_all(experiment, Store.of(experiment), ignore, ignore)
    return assemble(experiment, cells), failed


def test_a_stopped_bench_goes_on_at_the_next_cell(fake: SimpleNamespace) -> None:
    measure = fake.measure

    def killed(cell: Cell, watch: Any) -> dict[str, Any]:
        if cell.key["seed"] == 2:
            raise KeyboardInterrupt
        return dict(measure(cell, watch))

    fake.measure = killed
    with pytest.raises(KeyboardInterrupt):
        go()
    fake.measure = measure
    result, failed = go()
    assert fake.seen == [0, 1, 2] and not failed
    assert [cell["key"]["seed"] for cell in result["cells"]] == [0, 1, 2]
    assert result["claims"][0]["holds"] and result["provenance"]["seeds"] == [0, 1, 2]
    assert go()[0] == result, "nothing is measured twice"


def test_a_cell_with_another_plan_or_a_damaged_file_is_measured_anew(
    fake: SimpleNamespace, work: Path
) -> None:
    go()
    fake.version = 1
    go()
    assert fake.seen == [0, 1, 2] * 2
    for path in (work / "full" / "fake").glob("x-1-*.json"):
        path.write_text("{")
    go()
    assert fake.seen == [0, 1, 2] * 2 + [1]
    Store(work / "full" / "fake").forget("2")
    go()
    assert fake.seen[-1] == 2 and len(fake.seen) == 8


def test_errors_leave_a_cell_out_and_refusals_are_kept(
    fake: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.broken, fake.refusing = {0}, {1}
    result, failed = go()
    assert failed == ["x seed 0"] and "a bug" in capsys.readouterr().err
    assert result["cells"][0]["refused"] == "too small" and fake.seen == [2]
    fake.broken, fake.refusing = set(), set()
    assert len(go()[0]["cells"]) == 3 and fake.seen == [2, 0, 1]


def test_quick_cells_lie_apart(fake: SimpleNamespace, work: Path) -> None:
    go(quick=True)
    go()
    assert fake.seen == [0, 1, 2] * 2


# ---------------------------------------------------------------- a tiny task, to the end

TINY = {
    "title": "Tiny",
    "about": "Noise.",
    "experiment": "lowrank",
    "task": "tiny",
    "epochs": 9,
    "train": {"lr": 0.01, "batch": 8, "precision": "32-true"},
    "seeds": [0, 1],
    "budgets": [0.5],
    "rivals": {
        "nrmf": "nrmf(interval=1, samples=0, search=0.5)",
        "late": {"method": "energy", "epochs": 0, "finetune": 2},
    },
    "four_way": {
        "budget": 0.5,
        "recalibrate": 8,
        "methods": {
            "nrmf": 'nrmf(interval=1, samples=0, search=0.5, form="tucker2")',
            "b": "energy",
        },
    },
    "claims": {"champion": "nrmf", "rivals": ["late"]},
    "quick": {"epochs": 2, "seeds": [0], "images": {"train": 8, "test": 8}},
}


def noise() -> Data:
    random = torch.Generator().manual_seed(0)
    images, labels = torch.randn(24, 1, 28, 28, generator=random), torch.arange(24) % 10
    return Data((images, labels), test=(images[:16], labels[:16]), classes=10, name="noise")


@pytest.fixture
def tiny(work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    task = Task("tiny", "lenet5", Train(epochs=1, lr=0.01, batch=8), data=noise)
    monkeypatch.setattr(tasks, "get", lambda name: task)
    monkeypatch.setattr(experiments, "HERE", tmp_path)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return work


@pytest.mark.slow  # nine runs of two steps each
def test_quick_runs_the_same_code_and_writes_no_result(tiny: Path) -> None:
    before = sorted(run.RESULTS.glob("*"))
    done = CliRunner().invoke(run.app, ["tiny", "--quick"])
    assert done.exit_code == 0, done.output
    result = json.loads((tiny / "quick" / "tiny.json").read_text())
    assert result["quick"] and sorted(run.RESULTS.glob("*")) == before
    found = {cell["key"]["rival"]: cell["values"] for cell in result["cells"]}
    assert set(found) == {"base", "dense", "nrmf", "late", "four-way"}
    assert found["nrmf"]["step"] == 1 and found["late"]["step"] == 0
    assert all(0 <= found[name]["accuracy_before"] <= 1 for name in ("nrmf", "late"))
    assert len(found["four-way"]["rows"]) == 4
    assert found["nrmf"]["params"] <= 0.5 * found["base"]["params"]
    assert len(list((tiny / "bases").glob("*.safetensors"))) == 1
    assert "nrmf" in page.render([result])


def test_rivals_must_train_equally_long(tiny: Path) -> None:
    unfair = {**TINY, "rivals": {"nrmf": {"method": "nrmf", "epochs": 10}}}
    with pytest.raises(PliantError, match="must train for 9 epochs"):
        lowrank.cells(unfair)


@pytest.mark.slow  # two trainings of three steps
def test_looking_at_a_run_changes_nothing() -> None:
    train = Train(epochs=1, batch=8, lr=0.01)
    seen, unseen = zoo.build("lenet5"), zoo.build("lenet5")
    unseen.load_state_dict(copy.deepcopy(seen.state_dict()))
    method, budget = build("nrmf(interval=1, samples=8, search=0.4)"), {"params": 0.5}
    values = compress(seen, noise(), method, budget, train, seed=3)
    bare = start(unseen, method, Budget(params=0.5), data=noise(), steps=3, seed=3)
    fit(bare, noise(), train)
    assert values["step"] == 1 and values["misses"] == []
    for name, tensor in unseen.state_dict().items():
        assert torch.equal(tensor, seen.state_dict()[name]), name
    assert isinstance(Observed(method, print).parts[0], type(method))


# ---------------------------------------------------------------- the command line


def test_an_unknown_bench_is_refused_in_a_sentence() -> None:
    done = CliRunner().invoke(run.app, ["resnet21"])
    assert done.exit_code == 1 and "There is no bench 'resnet21'" in done.output


def test_missing_data_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLIANT_DATA", "/nowhere")
    with pytest.raises(DataError, match="set PLIANT_DATA"):
        bench_data.folder()


def test_claims_and_names_are_printed() -> None:
    done = CliRunner().invoke(run.app, ["claims", "--json"])
    rows = json.loads(done.output)
    states = [STATES.index(row["state"]) for row in rows]
    assert done.exit_code == 0 and states == sorted(states) and set(states) == {0, 1, 2}
    listed = CliRunner().invoke(run.app, ["list"]).output
    assert all(name in listed for name in NAMES)
    assert CliRunner().invoke(run.app, ["claims"]).exit_code == 0


def test_a_page_without_results_says_so() -> None:
    assert "no results yet" in page.render([])
