"""A training that is killed and resumed ends with the weights of an undisturbed one, exactly."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.budget import Budget
from pliant.data import Data, Train
from pliant.drivers import checkpoint
from pliant.drivers.loop import fit
from pliant.edits import Factor
from pliant.errors import ArtifactError, OutputError, TrainingError
from pliant.latency import Target
from pliant.method import Method
from pliant.run import Run, start

PLAN = Train(epochs=3, finetune=1.5, batch=8, lr=0.05, warmup=0.1, device="cpu", checkpoint_every=1)
STEPS, LAST = 12, 18  # of the search, of both phases; 4 an epoch


@dataclass(frozen=True)
class Busy(Method):
    """Draws random numbers, keeps state, hooks, edits midway and at the end."""

    strength: float = 0.01

    def prepare(self, run: Run) -> None:
        run.state["mean"] = {"second": torch.zeros(()), "steps": [0, 0.0]}
        run.hook(run.model.register_forward_hook(lambda *_: None))

    def penalty(self, run: Run) -> Tensor:
        return self.strength * run.model.get_parameter("first.weight").abs().sum()

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        noise = torch.randn((), generator=run.generator)
        run.state["mean"]["second"] += noise
        run.state["mean"]["steps"][0] += 1
        run.model.get_parameter("head.bias").add_(1e-3 * run.state["mean"]["second"])
        if run.step == STEPS // 2:
            run.apply(Factor("second", "spatial", (5,)))

    def after_epoch(self, run: Run) -> None:
        run.note(ranks={"second": [run.epoch]})

    def finalize(self, run: Run) -> None:
        run.apply(Factor("head", "svd", (2,)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.second(self.norm(self.first(images)).relu()).relu()
        return self.head(self.drop(hidden.mean((2, 3))))


class Wide(Net):
    """Has channels enough for plans that differ by little."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.second, self.head = nn.Conv2d(24, 24, 3, padding=1), nn.Linear(24, 4)


STAGES = (
    pliant.Stage(pliant.method("magnitude"), Budget(latency="85%")),
    pliant.Stage(pliant.method("energy(form='auto')"), Budget(latency="70%")),
)


def begin(method: Method | None = None, *, seed: int = 5, budget: Budget | None = None) -> Run:
    torch.manual_seed(0)
    example = (torch.zeros(1, 1, 8, 8),)
    return start(Net(), method or Busy(), budget, example=example, steps=STEPS, seed=seed)


def data() -> Data:
    noise = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (32, 1, 8, 8), generator=noise, dtype=torch.uint8)
    labels = torch.arange(32) % 4
    return Data((images, labels), (images[:10], labels[:10]), classes=4, augment="crop-flip")


def train(plan: Train = PLAN, **more: Any) -> Run:
    run = begin()
    fit(run, data(), plan, **more)
    return run


def assert_same(one: Run, other: Run) -> None:
    first, second = one.model.state_dict(), other.model.state_dict()
    assert list(first) == list(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert str(one.state) == str(other.state)
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    clock = ("seconds",)
    rows, others = (
        [{k: v for k, v in r.items() if k not in clock} for r in run.log] for run in (one, other)
    )
    assert rows == others
    assert (one.step, one.epoch, one.edits) == (other.step, other.epoch, other.edits)
    assert not other.model._forward_hooks


@pytest.fixture(scope="module")
def undisturbed() -> Run:
    return train()


def dying(at: int, death: Any) -> Any:
    """Watch a training and end it after a step of both phases."""
    taken: list[int] = []

    def watch(row: dict[str, Any]) -> None:
        taken.append(row["step"])
        if len(taken) == at:
            death()

    return watch


class Killed(Exception):
    """Ends a training where it stands, as a crash would."""


def crash() -> None:
    raise Killed


# 5: before the edit; 6: just after it; 7 and 11: within and before the end of an epoch;
# 12: all steps are done, the epoch is not; 14, 16, 17, 18: the same while fine-tuning.
@pytest.mark.parametrize("at", [1, 5, 6, 7, 11, 12, 14, 16, 17, 18])
@pytest.mark.parametrize("every", [1, 3, None])
def test_a_crash_at_any_step_changes_nothing(
    at: int, every: int | None, undisturbed: Run, tmp_path: Path
) -> None:
    plan = replace(PLAN, checkpoint_every=every)
    with pytest.raises(Killed):
        train(plan, folder=tmp_path, watch=dying(at, crash))
    torch.manual_seed(at)  # the caller's random state has no part in it
    assert_same(undisturbed, train(plan, folder=tmp_path, resume=True))


@pytest.mark.slow  # starts processes, which import torch
@pytest.mark.parametrize("at", [7, 15])
def test_a_killed_process_resumes(at: int, undisturbed: Run, tmp_path: Path) -> None:
    code = (
        "import os\n"
        "from tests.test_resume import *\n"
        f"train(folder=Path({str(tmp_path)!r}), watch=dying({at}, lambda: os._exit(9)))\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ, check=False)
    assert done.returncode == 9
    assert_same(undisturbed, train(folder=tmp_path, resume=True))


@pytest.mark.parametrize("at", [3, 8, 12, 13, 18])
def test_ctrl_c_saves_where_it_stands(at: int, undisturbed: Run, tmp_path: Path) -> None:
    plan = replace(PLAN, checkpoint_every=None)
    interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        train(plan, folder=tmp_path, watch=dying(at, interrupt))
    place = torch.load(tmp_path / checkpoint.NAME, weights_only=True)["place"]
    assert place["step"] + STEPS * place["phase"] == at
    assert_same(undisturbed, train(plan, folder=tmp_path, resume=True))


@dataclass(frozen=True)
class Interrupted(Busy):
    """Presses Ctrl-C in the middle of a step, as a hook that takes long would see it."""

    def after_step(self, run: Run) -> None:
        if run.step == STEPS // 2 and not run.finished:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        super().after_step(run)


def test_ctrl_c_within_a_step_waits_for_its_end(undisturbed: Run, tmp_path: Path) -> None:
    run = begin(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        fit(run, data(), PLAN, folder=tmp_path)
    assert len(run.edits) == 1 and not run.model._forward_hooks
    saved = torch.load(tmp_path / checkpoint.NAME, weights_only=True)
    assert saved["run"]["step"] == STEPS // 2 and len(saved["run"]["edits"]) == 1
    again = begin(Interrupted())
    fit(again, data(), PLAN, folder=tmp_path, resume=True)
    assert_same(undisturbed, again)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_loop_runs_outside_of_the_main_thread(undisturbed: Run) -> None:
    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(train()))
    thread.start()
    thread.join()
    assert_same(undisturbed, runs[0])


def test_resuming_what_is_done_changes_nothing(undisturbed: Run, tmp_path: Path) -> None:
    train(folder=tmp_path)
    seen: list[Any] = []
    assert_same(undisturbed, train(folder=tmp_path, resume=True, watch=seen.append))
    assert not seen


def test_resuming_without_a_checkpoint_begins(undisturbed: Run, tmp_path: Path) -> None:
    assert_same(undisturbed, train(folder=tmp_path / "new", resume=True))
    with pytest.raises(TrainingError, match="folder="):
        train(resume=True)


def test_the_callers_random_state_is_left_alone() -> None:
    run = begin()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    fit(run, data(), PLAN)
    assert torch.equal(before, torch.get_rng_state())


def test_adamw_and_chains_of_epochs_resume(tmp_path: Path) -> None:
    plan = replace(PLAN, optimizer="adamw", lr=0.01)
    whole = train(plan)
    with pytest.raises(Killed):
        train(plan, folder=tmp_path, watch=dying(8, crash))
    assert_same(whole, train(plan, folder=tmp_path, resume=True))


# ------------------------------------------------------------------ milliseconds


def unsteady(seed: int = 0, call: float = 1e-6) -> Target:
    """Times that are never the same twice, on a machine that takes so long for one call."""
    luck = random.Random(seed)

    def seconds(module: nn.Module, example: Any) -> float:
        sizes = [p.numel() for p in module.parameters() if p.dim() > 1]
        return (call + sum(1e-7 + 1e-8 * size for size in sizes)) * luck.uniform(0.9, 1.1)

    return Target.of(seconds)


@pytest.mark.slow  # every example compresses a network three times
@pytest.mark.parametrize(
    ("method", "at"),
    [
        *(("energy(form='auto')", 2), ("evbmf", 2), ("nrmf(search=0)", 2), ("nrmf(search=1)", 6)),
        *(("magnitude", 2), ("magnitude(rounds=2)", 5), ("random", 2), ("group_fisher", 2)),
        *((STAGES, 3), (STAGES, 6)),
    ],
)
def test_plans_of_unsteady_milliseconds_are_made_again(
    method: Any, at: int, tmp_path: Path
) -> None:
    plan = Train(epochs=1, finetune=1, batch=8, lr=0.01, device="cpu", checkpoint_every=1)

    def compressed(target: Target, **more: Any) -> pliant.Result:
        torch.manual_seed(0)
        asked: dict[str, Any] = {"train": plan, "target": target, "strict": False} | more
        budget = None if method is STAGES else "latency=80%"
        return pliant.compress(Wide(), data(), method, budget, **asked)

    whole, die = compressed(unsteady()), dying(at, crash)
    with pytest.raises(Killed):
        compressed(unsteady(), folder=tmp_path, watch=lambda row: "step" in row and die(row))
    again = compressed(unsteady(1, call=2e-5), folder=tmp_path, resume=True)
    assert whole.edits and whole.edits == again.edits
    assert whole.report.layers == again.report.layers
    first, second = whole.model.state_dict(), again.model.state_dict()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_damaged_checkpoint_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / checkpoint.NAME).write_bytes(b"no checkpoint")
    asked: dict[str, Any] = {"train": PLAN, "folder": tmp_path, "resume": True}
    with pytest.raises(ArtifactError, match="checkpoint"):
        pliant.compress(Net(), data(), "energy", target=Target.of(lambda *_: 1 / 0), **asked)


# ------------------------------------------------------------------ refusals


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train(folder=tmp_path)
    others = {
        "method": (begin(Busy(strength=0.02)), data(), PLAN),
        "seed": (begin(seed=6), data(), PLAN),
        "budget": (begin(budget=Budget(params=0.5)), data(), PLAN),
        "train": (begin(), data(), replace(PLAN, lr=0.1)),
        "data": (begin(), data().subset(train=31), replace(PLAN, batch=8)),
    }
    for name, (run, samples, plan) in others.items():
        with pytest.raises(TrainingError, match=f"another run: its {name} is"):
            fit(run, samples, plan, folder=tmp_path, resume=True)
        assert run.step == 0


@pytest.mark.parametrize("first", [None, Target.of(lambda module, example: 1.0, "phone")])
def test_a_checkpoint_of_another_target_is_refused(first: Target | None, tmp_path: Path) -> None:
    """Milliseconds of two places, or of none and one, make no report together."""
    asked: dict[str, Any] = {
        "train": PLAN,
        "folder": tmp_path,
        "example": (torch.zeros(1, 1, 8, 8),),
    }
    net = Net()
    pliant.compress(net, data(), Busy(), target=first, **asked)
    for other in (Target.of(lambda module, example: 1.0, "phone", batch=2), None):
        if other != first:
            with pytest.raises(TrainingError, match="another run: its target is .*, here it is "):
                pliant.compress(net, data(), Busy(), target=other, resume=True, **asked)
    again = replace(first, seconds=9.0) if first else None  # how long one looks changes nothing
    pliant.compress(net, data(), Busy(), target=again, resume=True, **asked)


@pytest.mark.parametrize("damage", [b"", b"no checkpoint", "half"])
def test_a_damaged_checkpoint_is_refused(damage: Any, tmp_path: Path) -> None:
    train(folder=tmp_path)
    path = tmp_path / checkpoint.NAME
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    with pytest.raises(ArtifactError, match="checkpoint"):
        train(folder=tmp_path, resume=True)


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write(tmp_path, {"number": 1})

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        checkpoint.write(tmp_path, {"number": 2})
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]
    assert torch.load(tmp_path / checkpoint.NAME)["number"] == 1
