"""Two processes on one CPU train one network: same weights on both, as one process would."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.budget import Budget
from pliant.data import Data, Epoch, Train
from pliant.drivers.loop import fit
from pliant.edits import Factor, to_json
from pliant.errors import TrainingError
from pliant.method import Method
from pliant.methods.lowrank.nrmf import NRMF
from pliant.methods.train.maxdropout import MaxDropout
from pliant.methods.train.mltp import MLTP
from pliant.methods.train.norm_loss import NormLoss
from pliant.methods.train.orthogonal_loss import OrthogonalLoss
from pliant.methods.train.p_diff import PDiff
from pliant.methods.train.progressive_stepwise import ProgressiveStepwise
from pliant.registry import build, entries
from pliant.run import Run, start
from pliant.testing.toys import SPECIAL, TOYS
from tests.ranks import both, join, leave

# 22 samples: the last batch is smaller, and both processes get equally many.
PLAN = Train(epochs=2, finetune=1, batch=4, lr=0.05, device="cpu", devices=2, checkpoint_every=1)
STEPS = 6


@dataclass(frozen=True)
class Shrinking(Method):
    """Soft-thresholds singular values after every step, and factorizes midway."""

    def penalty(self, run: Run) -> Tensor:
        return 0.01 * run.model.get_parameter("0.weight").square().sum()

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        weight = run.model.get_parameter("0.weight")
        left, sigma, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        weight.copy_(((left * (sigma - 1e-3).clamp(min=0)) @ right).view_as(weight))
        if run.step == STEPS // 2:
            run.apply(Factor("2", "tucker2", (3, 4)))


@dataclass(frozen=True)
class Asking(Method):
    """Half of the samples first, a second batch at every step, and weights for what is lost."""

    def epoch(self, epoch: Epoch, data: Data) -> Epoch:
        return replace(epoch, samples=0.5, rate=2.0) if epoch.number == 0 else epoch

    def weigh(self, run: Run, losses: Tensor, output: Any, batch: Any) -> Tensor:
        return 1 + losses.tanh()

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        inputs, labels = run.draw(len(batch[1]))
        return loss + run.criterion(run.model(*inputs), labels)


def asking(plan: Train) -> Run:
    seen = data(24)
    told = {"epochs": 2, "batch": plan.batch}
    run = start(net(norm=False), Asking(), data=seen, seed=2, steps=2 + 3, **told)
    fit(run, seen, plan)
    return run


# Each with whether a rank's own samples alone decide: then one process does the same.
TRAINING: dict[str, tuple[Method, bool]] = {
    "norm_loss": (NormLoss(0.1), True),
    "orthogonal_loss": (OrthogonalLoss(), True),
    "maxdropout": (MaxDropout(0.5, scope="sample", after=("1",)), True),
    "progressive_stepwise": (ProgressiveStepwise((0.5, 1.0)), True),
    "p_diff": (PDiff(0.4, window=1, ramp=0), False),  # a histogram of the rank's margins
    "mltp": (MLTP(alpha=0.1), False),  # an inner step by the rank's gradient
}


def taught(name: str, plan: Train) -> Run:
    """Train by a registered training method."""
    seen, method = data(24), TRAINING[name][0]
    plan = replace(plan, schedule="constant", warmup=0)
    run = start(net(norm=False), method, data=seen, seed=2, epochs=2, batch=plan.batch)
    fit(run, seen, plan)
    return run


def net(*, norm: bool) -> nn.Module:
    torch.manual_seed(0)
    middle: nn.Module = nn.BatchNorm2d(6) if norm else nn.Tanh()
    layers = [nn.Conv2d(2, 6, 3), middle, nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(24, 3)]
    return nn.Sequential(*layers)


def data(count: int) -> Data:
    noise = torch.Generator().manual_seed(1)
    images, labels = torch.randn(count, 2, 6, 6, generator=noise), torch.arange(count) % 3
    return Data((images, labels), (images[:9], labels[:9]), classes=3)


def train(plan: Train, count: int, *, norm: bool, **more: Any) -> Run:
    example = (torch.zeros(1, 2, 6, 6),)
    run = start(net(norm=norm), Shrinking(), example=example, steps=STEPS, seed=2)
    fit(run, data(count), plan, **more)
    return run


def planned() -> list[dict[str, Tensor]]:
    """Give the network after every step of a training that plans from data midway.

    What a layer reads, and so the plan, depends on the statistics of BatchNorm, which every
    process gathers from batches of its own.
    """
    torch.manual_seed(0)
    wide = [nn.Conv2d(2, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3)]
    model = nn.Sequential(*wide, nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    seen, method = data(22), NRMF(search=0.5, samples=16)
    run = start(model, method, Budget(params=0.5), data=seen, steps=STEPS, seed=2)
    steps: list[dict[str, Tensor]] = []
    fit(run, seen, PLAN, watch=lambda row: steps.append(copy.deepcopy(model.state_dict())))
    return steps


PRUNERS = (
    *("magnitude", "random", "fpgm", "slimming(start=0.5)", "group_fisher(samples=16, passes=1)"),
    *("asrfp(epochs=2)", "activation_density(rounds=2, window=1)", "constrained_projection"),
    *("majority_voting(samples=16, rounds=2)", "dynamic_channel_propagation", "lre_amc(rounds=2)"),
    *("sspruning(start=0.5)", "discriminant_information(search='none', start=0.5)"),
    *("hfp(samples=16, rounds=2)", "pgp(rounds=2)", "mi_layers(ratio=0.9, start=0.5)"),
    *("hgsr(start=0.5, samples=8, passes=1)", "mint(groups=2)", "aimp(sparsity=0.6)"),
)


def pruned(spec: str) -> dict[str, Any]:
    """Prune while two ranks train; what is left, and where."""
    toy, images = TOYS["residual"], torch.Generator().manual_seed(1)
    classes = toy.data().class_count
    labels = torch.arange(40) % classes
    seen = Data((torch.randn(40, *toy.shape, generator=images), labels), classes=classes)
    plan = replace(PLAN, finetune=0, checkpoint_every=None)
    run = start(toy.model(), build(spec), data=seen, steps=10, epochs=2, batch=4, seed=2)
    fit(run, seen, plan)
    run.finish(strict=False)
    return {"model": run.model.state_dict(), "edits": repr(run.edits)}


SEARCHES = {
    "edarts(warmup=0.0, every=1, batch=4)": "supernet",
    "edarts(drop_path=0.5)": "cells",
    "fine_tuned_darts(growth=100)": "cells",
    "ednas(batch=4, scope='all')": "plain",
    "kws_nas(batch=4, every=1, warmup=0.0)": "mobile",
    "vpu_nas(batch=4, every=1, warmup=0.0, estimator='gates')": "mobile",
    "stage_wise(growth=1, iterations=1)": "staged",
    "planting(width=0.5, first=0.25, rounds=1)": "plain",
    "ssal(width=8)": "plain",
    "oskd(warmup=0.0, ramp=0.0, memory=8)": "plain",
    "kd_structure(start=0.5)": "plain",
}


def searched(spec: str) -> dict[str, Any]:
    """Search, grow or distil while two ranks train: what came out of it, and all steps to it."""
    toy = (SPECIAL | TOYS)[SEARCHES[spec]]
    model, seen = toy.model(), toy.data()
    plan = Train(epochs=2, batch=4, lr=0.05, device="cpu", devices=2, schedule="constant")
    run = start(model, build(spec), data=seen, steps=plan.steps(seen.steps(4, 2)), seed=1)
    sums: list[list[float]] = []

    def look(row: Any) -> None:
        sums.append([float(p.detach().double().sum()) for p in model.parameters()])

    fit(run, seen, plan, watch=look)
    return {"model": model.state_dict(), "edits": json.dumps(to_json(run.edits)), "steps": sums}


class Killed(Exception):
    pass


def die_at(step: int) -> Any:
    def watch(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise Killed

    return watch


def worker(rank: int, port: int, folder: str) -> None:
    """Train by all methods below, and once more across a crash; keep what came out of it."""
    join(rank, port)
    found = {}
    for norm, count in ((True, 22), (False, 24)):
        run = train(PLAN, count, norm=norm)
        found[f"norm={norm}"] = {"model": run.model.state_dict(), "loss": run.log[-1]["loss"]}
    found["planned"] = planned()
    run = asking(PLAN)
    found["asking"] = {"model": run.model.state_dict(), "loss": run.log[-1]["loss"]}
    for name in TRAINING:
        run = taught(name, PLAN)
        found[name] = {"model": run.model.state_dict(), "loss": run.log[-1]["loss"]}
    found["pruned"] = {spec: pruned(spec) for spec in PRUNERS}
    found["searched"] = {spec: searched(spec) for spec in SEARCHES}
    try:
        train(PLAN, 22, norm=True, folder=Path(folder) / "run", watch=die_at(5))
    except Killed:
        run = train(PLAN, 22, norm=True, folder=Path(folder) / "run", resume=True)
        found["resumed"] = {"model": run.model.state_dict(), "loss": run.log[-1]["loss"]}
    leave(rank, folder, found)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return both(worker, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow  # two processes, each of which imports torch
@pytest.mark.parametrize("case", ["norm=True", "norm=False", "asking", *TRAINING])
def test_all_ranks_end_with_the_same_weights(case: str, ranks: list[dict[str, Any]]) -> None:
    zero, one = (found[case] for found in ranks)
    assert "norm=" not in case or "2.core.weight" in zero["model"]
    assert [n for n, v in zero["model"].items() if not torch.equal(v, one["model"][n])] == []
    assert zero["loss"] == one["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["norm=False", "asking", *(name for name, (_, alike) in TRAINING.items() if alike)]
)
def test_two_ranks_equal_one_process_with_their_batches(
    case: str, ranks: list[dict[str, Any]]
) -> None:
    """Every rank draws and gets its share of what one process would."""
    plan, zero = replace(PLAN, devices=1, batch=8), ranks[0][case]
    with one_thread():
        if case in TRAINING:
            alone = taught(case, plan)
        else:
            alone = asking(plan) if case == "asking" else train(plan, 24, norm=False)
    for name, tensor in alone.model.state_dict().items():
        assert torch.allclose(tensor, zero["model"][name], atol=1e-5), name
    assert alone.log[-1]["loss"] == pytest.approx(zero["loss"], rel=1e-4)


@contextmanager
def one_thread() -> Iterator[None]:
    """Work as each rank does: sums in another order can turn the sign of a singular vector."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_all_ranks_make_the_same_plan(ranks: list[dict[str, Any]]) -> None:
    zero, one = (found["planned"] for found in ranks)
    assert len(zero[0]) < len(zero[STEPS // 2]) and len(zero) == len(one)
    for step, (mine, other) in enumerate(zip(zero, one, strict=True)):
        weights = [name for name in mine if "running" not in name]
        assert weights == [name for name in other if "running" not in name], step
        assert [n for n in weights if not torch.equal(mine[n], other[n])] == [], step


@pytest.mark.slow
@pytest.mark.parametrize("spec", PRUNERS)
def test_all_ranks_prune_alike(spec: str, ranks: list[dict[str, Any]]) -> None:
    """The same channels, blocks or weights, though each rank sees batches of its own."""
    zero, one = (found["pruned"][spec] for found in ranks)
    assert zero["edits"] == one["edits"] != "[]"
    names = [name for name in zero["model"] if "running" not in name]
    assert [n for n in names if not torch.equal(zero["model"][n], one["model"][n])] == []


def test_no_pruning_method_is_left_out() -> None:
    names = {entry.name for entry in entries(family="prune")}
    assert {spec.split("(")[0] for spec in PRUNERS} == names


@pytest.mark.slow
@pytest.mark.parametrize("spec", SEARCHES)
def test_both_processes_end_with_the_same_network(spec: str, ranks: list[dict[str, Any]]) -> None:
    zero, one = (found["searched"][spec] for found in ranks)
    assert zero["edits"] == one["edits"]
    assert len(zero["steps"]) > 2 and zero["steps"] == one["steps"]  # also within an epoch
    assert zero["model"].keys() == one["model"].keys()
    assert [n for n, v in zero["model"].items() if not torch.equal(v, one["model"][n])] == []


@pytest.mark.slow
def test_ranks_resume_after_a_crash(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        whole, resumed = found["norm=True"]["model"], found["resumed"]["model"]
        assert [n for n, v in whole.items() if not torch.equal(v, resumed[n])] == []


def test_one_process_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(TrainingError, match="torchrun --nproc-per-node 2"):
        train(PLAN, 22, norm=True)
