"""Softer pruning: its limits bit for bit, its schedules, and what leaves."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from pliant.budget import Budget
from pliant.data import Data
from pliant.edits import Prune
from pliant.errors import MethodError, TrainingError
from pliant.families.prune.soft import factor_at, ramp_at
from pliant.method import Method
from pliant.methods.prune.asrfp import ASRFP
from pliant.run import Run, start
from pliant.surgery.batchnorm import recalibrate
from pliant.surgery.prove import silence
from pliant.testing import Case, toys
from tests.cases.prune import REFUSES, TOYS, kept, pair, run_of

EPOCHS, BATCHES = 3, 2


def images() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    toy = toys.TOYS["plain"]
    return toy.model(), list(toy.data().batches("train", 16))


def train(method: Method) -> Run:
    """Three epochs of two steps with momentum, through a run."""
    model, batches = images()
    optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
    example = (batches[0][0][:1],)
    run = start(model, method, example=example, optimizer=optimizer, steps=EPOCHS * BATCHES)
    for _ in range(EPOCHS):
        for step, (inputs, labels) in enumerate(batches):
            learn(model, optimizer, inputs, labels, step)
            run.after_step()
        run.after_epoch()
    return run


def learn(model: nn.Module, optimizer: SGD, inputs: Tensor, labels: Tensor, step: int) -> None:
    torch.manual_seed(step)  # of dropout
    model.train()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def alpha_0_is_soft_filter_pruning() -> None:
    """Check 1: bit for bit what a loop does that knows nothing of it."""
    with torch.random.fork_rng(devices=[]):
        found = train(ASRFP(ratio=0.5, alpha=0.0, ramp=0.0, least=0.0, start=1.0)).model
        model, batches = images()
        optimizer = SGD(model.parameters(), 0.05, momentum=0.9)
        convs = [layer for layer in model if isinstance(layer, nn.Conv2d)]
        for epoch in range(EPOCHS + 1):
            for conv in convs:
                norms = conv.weight.detach().double().flatten(1).norm(dim=1)
                weak = norms.argsort(stable=True)[: len(norms) // 2]
                conv.weight.detach()[weak] *= 0.0
            for step, (inputs, labels) in enumerate(batches if epoch < EPOCHS else ()):
                learn(model, optimizer, inputs, labels, step)
    assert same(found, model)


def alpha_1_is_plain_training() -> None:
    with torch.random.fork_rng(devices=[]):
        soft = train(ASRFP(decay="constant", zero_from=2.0, start=1.0)).model
        plain = train(Method()).model
    assert same(soft, plain)


def a_masking_is_a_step_of_weight_decay() -> None:
    """Check 2: of size lr on (lambda / 2) W^2 with lambda = (1 - alpha) / lr, on weak filters."""
    alpha, rate = 0.3, 0.05
    model, _ = images()
    dense = copy.deepcopy(model)
    method = ASRFP(ratio=0.5, alpha=alpha, ramp=0.0, decay="constant", least=0.0, start=1.0)
    start(model, method, example=toys.TOYS["plain"].inputs(1), steps=1)  # masks before epoch 0
    for found, before in zip(model, dense, strict=True):
        if not isinstance(before, nn.Conv2d):
            continue
        norms = before.weight.detach().flatten(1).norm(dim=1)
        weak = (norms.argsort(stable=True).argsort() < len(norms) // 2).float()
        gradient = (1 - alpha) / rate * before.weight * weak.view(-1, 1, 1, 1)
        assert torch.allclose(found.weight, before.weight - rate * gradient, atol=1e-7)


def surgery_is_the_masked_network() -> None:
    """Check 3: floor(N P) filters are zero and leave; with silent norms nothing else changes."""
    share = 0.4
    with torch.random.fork_rng(devices=[]):
        run = train(ASRFP(ratio=share, least=0.0, start=1.0))
    masked, inputs = copy.deepcopy(run.model).eval(), toys.TOYS["plain"].inputs(4)
    run.finish()
    outs = {e.layer: e for e in run.edits if isinstance(e, Prune) and e.side == "out"}
    convs = [name for name, layer in masked.named_modules() if isinstance(layer, nn.Conv2d)]
    assert set(outs) == set(convs)
    for name, edit in outs.items():
        assert edit.of - len(edit.keep) == math.floor(edit.of * share)
        masked.get_submodule(name).weight.detach()[list(edit.removed())] = 0  # type: ignore[union-attr, operator]
    small = run.model.eval()
    with torch.no_grad():
        assert not torch.allclose(small(*inputs), masked(*inputs), atol=1e-5)  # beta is still there
        silence(masked, [e for e in run.edits if isinstance(e, Prune)])
        assert torch.allclose(small(*inputs), masked(*inputs), atol=1e-5)


def batch_norm_hides_a_fading() -> None:
    """Check 5: in training it is invisible, in evaluation not, until norms are mended."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    x = torch.randn(64, 3, 8, 8)
    recalibrate(model, [(x,)])
    faded = copy.deepcopy(model)
    with torch.no_grad():
        faded[0].weight[:4] *= 0.5

        def difference(*, training: bool) -> float:
            one, other = (copy.deepcopy(net).train(training)(x) for net in (model, faded))
            return float((one - other).norm() / one.norm())

        assert difference(training=True) < 1e-3
        assert difference(training=False) > 0.05
        recalibrate(faded, [(x,)])
        assert difference(training=False) < 1e-3


def schedules_are_those_of_the_paper() -> None:
    for sigma, values in (
        (1e-5, {10: 0.562, 50: 0.0562, 100: 0.0032}),
        (1e-7, {10: 0.447, 50: 0.0178, 100: 0.0003}),
    ):
        for epoch, value in values.items():
            found = factor_at(epoch, 200, 1.0, sigma, "exponential", 0.9)
            assert found == pytest.approx(value, rel=0.1)
    assert factor_at(179, 200, 1.0, 1e-3, "exponential", 0.9) > 0
    assert factor_at(180, 200, 1.0, 1e-3, "exponential", 0.9) == 0
    assert factor_at(50, 201, 0.8, 1e-5, "linear", 0.9) == pytest.approx(0.6)
    assert ramp_at(25, 200, 0.125) == pytest.approx(0.75)
    assert ramp_at(50, 200, 0.125) == pytest.approx(0.9375)
    assert ramp_at(0, 200, 0.125) == 0 and ramp_at(190, 200, 0.125) == ramp_at(0, 200, 0.0) == 1


def fading_counts_epochs_or_parts_of_the_training() -> None:
    def factors(**options: float) -> list[float]:
        with torch.random.fork_rng(devices=[]):
            method = ASRFP(decay="linear", zero_from=2.0, start=1.0, **options)  # type: ignore[arg-type]
            run = train(method)
        return [round(row["alpha"], 4) for row in run.log if "alpha" in row]

    assert factors() == [1.0, 1.0, 0.5, 0.0]  # before the first epoch, and after each
    assert factors(epochs=6) == [1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    assert factors(interval=2) == [1.0, 1.0, 0.0]


def single_weights_fade_too() -> None:
    with torch.random.fork_rng(devices=[]):
        run = train(ASRFP(unit="weight", ratio=0.25))
    run.finish()
    weight = run.model.get_submodule("3").weight
    assert int((weight == 0).sum()) == weight.numel() // 4 and not run.edits  # type: ignore[operator, union-attr]
    with pytest.raises(MethodError, match="single weights"):
        run_of(pair(1.0, 2.0), ASRFP(unit="weight"), Budget(params=0.5))


def every_convolution_fades_if_asked() -> None:
    """Those that end in a sum become zero and stay."""
    model, inputs = toys.TOYS["residual"].model(), toys.TOYS["residual"].inputs(1)
    run = start(model, ASRFP(ratio=0.5, every=True), example=inputs)
    run.finish()
    shortcut = run.model.get_submodule("shortcut").weight
    assert int((shortcut.flatten(1).norm(dim=1) == 0).sum()) == 6  # type: ignore[operator, union-attr]
    assert shortcut.shape[0] == 12  # type: ignore[union-attr]
    assert {layer for layer, side in kept(run) if side == "out"} == {"stem", "branch.0"}


def bad_options_and_norms_are_refused() -> None:
    for options in ({"ratio": 1.0}, {"alpha": 1.5}, {"sigma": 0.0}, {"interval": 0}):
        with pytest.raises(MethodError):
            run_of(pair(1.0, 2.0), ASRFP(**options))  # type: ignore[arg-type]
    run = run_of(pair(1.0, 2.0), ASRFP(start=1.0), steps=1)
    run.model[0].weight.data[0] = math.nan
    with pytest.raises(TrainingError, match="must stay finite"):
        run.finish()


def a_budget_sets_the_rate() -> None:
    data = Data((torch.randn(8, 2), torch.arange(8) % 2), classes=2)
    run = start(pair(*map(float, range(1, 9))), ASRFP(), Budget(params=0.5), data=data)
    run.finish()
    assert kept(run)["0", "out"] == (5, 6, 7)


CASES = (
    Case(
        "asrfp",
        toys=TOYS,
        refuses=REFUSES,
        variants=(
            "asrfp(alpha=0.0, ramp=0.0)",
            "asrfp(epochs=4, start=0.5)",
            "asrfp(every=True, norms=True)",
        ),
        own=(
            alpha_0_is_soft_filter_pruning,
            alpha_1_is_plain_training,
            a_masking_is_a_step_of_weight_decay,
            surgery_is_the_masked_network,
            batch_norm_hides_a_fading,
            schedules_are_those_of_the_paper,
            fading_counts_epochs_or_parts_of_the_training,
            single_weights_fade_too,
            every_convolution_fades_if_asked,
            bad_options_and_norms_are_refused,
            a_budget_sets_the_rate,
        ),
    ),
)
