"""The pace of short trainings: when methods cut by default, and that options are obeyed."""

import pytest
import torch
from torch import nn

from pliant.compose import resolve
from pliant.data import Data
from pliant.plan.pace import cuts, every, until
from pliant.run import Run, start

LABELS = torch.arange(8) % 2
DATA = Data((torch.randn(8, 3, 4, 4), LABELS), classes=2)


def begun(spec: str, steps: int) -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )
    return start(model, resolve(spec), data=DATA, steps=steps)


def cut_at(spec: str, steps: int) -> list[int]:
    """The steps after which cuts were made; the end is one more than all of them."""
    run, found = begun(spec, steps), list[int]()
    done = made(run)
    for run.step in range(1, steps + 1):
        run.method.after_step(run)
        found += [run.step] * (made(run) - done)
        done = made(run)
    run.finish()
    return [*found, *[steps + 1] * (made(run) - done)]


def made(run: Run) -> int:
    """How many cuts a pruner made, and whether a network was split."""
    return int(run.state["split"] if "split" in run.state else run.state["rounds"])


@pytest.mark.parametrize(
    ("spec", "short", "long"),
    [
        ("slimming", [20], [300]),
        ("asrfp", [20], [300]),
        ("hgsr(samples=4, passes=1)", [20], [280]),
        ("pgp", [10, 20], [30, 60, 90, 120, 150, 180, 210, 240, 270, 300]),
        ("majority_voting", [5, 19], [40, 95, 150, 205]),
        ("trp", [20], [200]),
        ("slimming(start=1.0)", [51], [401]),
        ("slimming(start=0.9)", [45], [360]),
        ("asrfp(start=1.0)", [51], [401]),
        ("hgsr(samples=4, passes=1, start=0.7)", [35], [280]),
        ("pgp(rounds=2, end=0.8)", [20, 40], [160, 320]),
        ("majority_voting(rounds=4, end=0.65)", [5, 12, 19, 26], [40, 95, 150, 205]),
        ("trp(search=0.5)", [25], [200]),
        ("magnitude(rounds=2)", [13], [100]),
    ],
)
def test_last_cuts_leave_steps_and_options_are_obeyed(
    spec: str, short: list[int], long: list[int]
) -> None:
    """Of 50 steps 30 are left and of 400 at least 100, with 10 between cuts, unless written."""
    assert (cut_at(spec, 50), cut_at(spec, 400)) == (short, long)


def test_a_written_option_may_stand_beside_a_default() -> None:
    """What one option asks for is kept; the other follows the steps."""
    assert cut_at("pgp(rounds=4)", 50) == [5, 10, 15, 20]
    assert cut_at("majority_voting(rounds=4)", 50) == [5, 10, 15, 20]
    assert cut_at("majority_voting(start=0.8)", 50) == [40]


@pytest.mark.parametrize(
    ("spec", "steps", "found"),
    [("trp", 50, [4, 8, 12, 16, 20]), ("trp(interval=10)", 50, [10, 20]), ("trp", 50 * 5, 20)],
)
def test_kernels_are_cut_five_times_in_a_search(
    spec: str, steps: int, found: list[int] | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = begun(spec, steps), list[int]()
    monkeypatch.setattr("pliant.methods.lowrank.trp.cut", lambda *_: seen.append(run.step))
    for run.step in range(1, steps + 1):
        run.method.after_step(run)
    times = sorted(set(seen))
    assert times == found if isinstance(found, list) else times[0] == found


def test_the_rule_gives_way_at_100_steps_and_60_percent() -> None:
    shares = [until(None, 1.0, steps) for steps in (1, 100, 166, 167, 200, 1000)]
    assert shares == pytest.approx([0.4, 0.4, 0.4, 1 - 100 / 167, 0.5, 0.9])
    assert [until(None, 0.5, steps) for steps in (0, 199, 200, 10**6)] == pytest.approx(
        [0.5, 1 - 100 / 199, 0.5, 0.5]
    )
    assert [cuts(None, 4, steps) for steps in (0, 9, 29, 40, 400)] == [1, 1, 2, 4, 4]
    assert [every(None, 20, steps) for steps in (0, 4, 99, 100)] == [1, 1, 19, 20]
