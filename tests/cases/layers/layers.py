"""Layers: what the papers' layers compute, and what becomes of a network that had others."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from pliant.compose import chain
from pliant.cost import layer_costs
from pliant.edits import Swap, from_json, replay, to_json
from pliant.errors import EditError
from pliant.math.filters import RECTIFIED, align
from pliant.methods.layers.weightalign import WeightAlign
from pliant.observe.order import order
from pliant.run import Run, start
from pliant.testing import Case
from pliant.testing.compressed import same_tensors
from pliant.testing.toys import TOYS
from pliant.testing.trial import walk


def noise(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


# Kernels, and how their filters lie in them.
KERNELS: tuple[tuple[Tensor, dict[str, int]], ...] = (
    (5 * noise(6, 4, 3, 3) + 0.3, {}),
    (noise(6, 30), {}),
    (noise(4, 3, 3, 3), {"transposed": True, "groups": 2}),
)


def mean_and_variance_are_those_of_the_definition() -> None:
    """Mean 0, variance 2 gain^2 / n, whatever the mean and scale of the kernel were."""
    weight, gain = KERNELS[0][0], noise(6, seed=1)
    rows = align(weight, gain, scale=2.0, eps=1e-12).flatten(1)
    assert rows.mean(1).abs().max() < 1e-7
    assert torch.allclose(rows.var(1, correction=0), 2 * gain**2 / 36, rtol=1e-5)
    moved = align(7 * weight - 3, gain, scale=2.0, eps=1e-12).flatten(1)
    assert torch.allclose(moved, rows, atol=1e-5)


def filters_of_every_kernel_are_aligned() -> None:
    """Output channel by output channel, seen from outside: one channel's weights at a time."""
    for weight, layout in KERNELS:
        groups, transposed = layout.get("groups", 1), bool(layout.get("transposed"))
        count = weight.shape[1] * groups if transposed else weight.shape[0]
        done = align(weight, torch.ones(count), transposed=transposed, groups=groups, eps=1e-12)
        for channel in range(count):
            if transposed:
                mine = done.chunk(groups)[channel // weight.shape[1]][:, channel % weight.shape[1]]
            else:
                mine = done[channel]
            assert mine.mean().abs() < 1e-7
            variance = mine.var(correction=0)
            assert torch.isclose(variance, torch.tensor(RECTIFIED / mine.numel()).double())


def equal_to_scaled_weight_standardization() -> None:
    """As timm's ScaledStdConv2d computes it: batch_norm of the rows, scaled by root(2 / n)."""
    weight, gain = KERNELS[0][0], noise(6, seed=1)
    scaled = gain * (2 / 36) ** 0.5
    rows = weight.reshape(1, 6, -1)
    other = F.batch_norm(rows, None, None, weight=scaled, training=True, momentum=0.0, eps=1e-12)
    assert torch.allclose(
        align(weight, gain, scale=2.0, eps=1e-12), other.reshape_as(weight), atol=1e-5
    )


def equal_to_the_layer_of_timm() -> None:
    """Its constant set to root(2), its gain to ours: the same outputs."""
    timm = pytest.importorskip("timm", reason="timm is in the environment of `make coverage`")
    layer = timm.layers.ScaledStdConv2d(4, 6, 3, padding=0, bias=False, gamma=2**0.5, eps=1e-12)
    layer = layer.double()
    inputs, gain = noise(2, 4, 8, 8, seed=2), noise(6, seed=1)
    with torch.no_grad():
        layer.gain.copy_(gain.reshape(layer.gain.shape))
        ours = align(layer.weight, gain, scale=2.0, eps=1e-12)
        assert torch.allclose(F.conv2d(inputs, ours), layer(inputs), atol=1e-5)


def gradients_lie_in_the_sphere_of_centred_filters() -> None:
    """They sum to 0, and are orthogonal to w - mean; a filter of equal weights stays finite."""
    weight = KERNELS[0][0].clone().requires_grad_()
    (align(weight, noise(6, seed=1), eps=1e-12) * noise(6, 4, 3, 3, seed=2)).sum().backward()
    assert weight.grad is not None
    rows, pulls = weight.detach().flatten(1), weight.grad.flatten(1)
    assert pulls.sum(1).abs().max() < 1e-6
    assert (pulls * (rows - rows.mean(1, keepdim=True))).sum(1).abs().max() < 1e-6
    flat = torch.ones(2, 3, requires_grad=True)
    align(flat, torch.ones(2)).square().sum().backward()
    assert flat.grad is not None and torch.isfinite(flat.grad).all()


def stack(depth: int, width: int) -> nn.Sequential:
    """Convolutions and rectifiers with weights of no sensible mean and scale."""
    parts: list[nn.Module] = []
    for number in range(depth):
        conv = nn.Conv2d(3 if not parts else width, width, 3, padding=1)
        with torch.no_grad():
            conv.weight.copy_(5 * noise(*conv.weight.shape, seed=number) + 0.3)
        parts += [conv, nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


def begun(model: nn.Module, method: WeightAlign, shape: tuple[int, ...] = (3, 8, 8)) -> Run:
    optimizer = SGD([*model.parameters()], 0.05, momentum=0.9, weight_decay=0.1)
    example = (noise(2, *shape).float(),)
    return start(model, method, example=example, optimizer=optimizer, steps=4)


def spreads(model: nn.Sequential, images: Tensor) -> list[float]:
    """The variance of what each convolution gives, over that of the first."""
    found, hidden = [], images
    with torch.no_grad():
        for layer in model:
            hidden = layer(hidden)
            found += [float(hidden.var())] if isinstance(layer, nn.Conv2d) else []
    return [value / found[0] for value in found]


def variance_survives_many_layers() -> None:
    """Through 20 layers within a factor of 4; the paper's scale loses 1/pi in each of them."""
    model, images = stack(20, 32), noise(4, 3, 8, 8).float()
    assert not torch.isfinite(torch.tensor(spreads(model, images))).all()
    begun(model, WeightAlign())
    found = spreads(model, images)
    assert min(found) > 0.25 and max(found) < 4
    model = stack(20, 32)
    begun(model, WeightAlign(scale=2.0))
    assert spreads(model, images)[-1] < 0.01


def normed() -> nn.Sequential:
    """Convolutions with batch norms: one right behind, one behind a rectifier, one depthwise."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


def a_sample_does_not_see_its_batch() -> None:
    """In training mode too: of 2, 8 and 128 samples the first is answered alike."""
    model, images = stack(4, 8).train(), noise(128, 3, 8, 8).float()
    begun(model, WeightAlign())
    alone = model(images[:1])
    for size in (2, 8, 128):
        assert (model(images[:size])[:1] - alone).abs().max() < 1e-6
    other = normed().train()
    assert (other(images[:2])[:1] - other(images[:128])[:1]).abs().max() > 1e-2
    run = begun(normed(), WeightAlign(depthwise=True))
    answers = [run.model(images[:size])[:1] for size in (1, 2, 8, 128)]
    assert all((answer - answers[0]).abs().max() < 1e-6 for answer in answers)


def batch_norms_are_swapped_in_the_open() -> None:
    """What goes and what stays is in the plan and in the reasons; the file rebuilds it."""
    run = begun(normed(), WeightAlign())
    gone, biased = Swap("1", "identity"), Swap("0", "biased")
    assert run.edits == [gone, Swap("6", "identity"), biased]
    assert run.reasons["4"] == "the layer before it is not aligned"
    assert "depthwise" in run.reasons["3"] and "last layer" in run.reasons["9"]
    run.finish()
    fresh = normed()
    replay(fresh, from_json(json.loads(json.dumps(to_json(run.edits)))), weights=False)
    fresh.load_state_dict(run.model.state_dict())
    images = noise(4, 3, 8, 8).float()
    assert torch.equal(fresh.eval()(images), run.model.eval()(images))
    assert list(fresh.state_dict()) == list(run.model.state_dict())
    kept = begun(normed(), WeightAlign(norms="keep"))
    assert not kept.edits and kept.state["aligned"] == ["0"]


def folding_leaves_what_was_computed() -> None:
    """Plain layers with the same outputs; of the old filters the optimizer knows nothing more."""
    model, images = stack(3, 8), noise(4, 3, 8, 8).float()
    run = begun(model, WeightAlign(zero=("2",)))
    assert run.optimizer is not None
    known = run.optimizer.param_groups[0]["params"]
    assert [p.shape for p in known[:3]] == [(8, 3, 3, 3), (8,), (8,)]  # kernel, its gain, bias
    run.model(images).square().sum().backward()
    run.before_step()
    run.optimizer.step()
    run.after_step()
    before = run.model(images)
    run.finish()
    assert torch.equal(run.model(images), before)
    assert {id(p) for p in known} == {id(p) for p in run.model.parameters()}
    assert model[0].weight not in run.optimizer.state and model[8].weight in run.optimizer.state
    assert type(model[0]) is nn.Conv2d and model[0].weight.mean((1, 2, 3)).abs().max() < 1e-6


def gains_and_biases_do_not_decay() -> None:
    """With no gradient but decay, kernels shrink and gains stay."""
    run = begun(stack(2, 8), WeightAlign())
    assert run.optimizer is not None
    conv = run.model[0]  # type: ignore[index]
    gain, raw = conv.parametrizations.weight[0].gain, conv.parametrizations.weight.original
    before = raw.detach().clone()
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.before_step()
    run.optimizer.step()
    assert torch.equal(gain, torch.ones(8))
    assert torch.allclose(raw, before * (1 - 0.05 * 0.1))


def what_follows_in_a_chain_resumes() -> None:
    """Resuming in the second stage, the gains of the first are out of model and optimizer."""
    method, toy = chain("weightalign", "energy"), TOYS["plain"]
    whole = walk(method, toy, None)
    again = walk(method, toy, None, stop=6)
    same_tensors(whole.run.model, again.run.model, "resumed behind the alignment")


def order_sees_through_no_activation() -> None:
    """A norm behind an activation in place reads the activation, not the layer before it."""
    seen = order(normed(), (noise(2, 3, 8, 8).float(),), ["0", "1", "3", "4", "6"])
    assert seen.called == ("0", "1", "3", "4", "6")
    assert seen.reads == {"0": "", "1": "0", "3": "", "4": "3", "6": ""}


def swaps_are_refused_in_words() -> None:
    for swap, says in (
        (Swap("0", "identity"), "must be a batch norm"),
        (Swap("1", "biased"), "must be a convolution"),
        (Swap("3", "biased"), "has a bias already"),
        (Swap("3", "dropout"), "Unknown form 'dropout'"),
        (Swap("99", "biased"), "has no layer '99'"),
    ):
        with pytest.raises(EditError, match=says):
            swap.apply(normed())


def swaps_cost_what_they_say() -> None:
    """Eight biases more; two times eight parameters and the statistics less."""
    model, example = normed(), (noise(1, 3, 8, 8).float(),)
    costs = layer_costs(model, example)
    assert Swap("0", "biased").predict(costs["0"]).params == 8 * 27 + 8
    assert Swap("0", "biased").predict(costs["0"]).bytes == 4 * (8 * 27 + 8)
    assert Swap("1", "identity").predict(costs["1"]).bytes == 0
    linear = nn.Sequential(nn.Linear(6, 5, bias=False))
    before = layer_costs(linear, (torch.zeros(1, 3, 6),))["0"]
    assert Swap("0", "biased").predict(before).params == 35


CASES = [
    Case(
        "weightalign",
        variants=(
            'weightalign(norms="keep", affine=False)',
            'weightalign(depthwise=True, scale=1.0, exclude=("0",))',
        ),
        refuses={"single": "needs a convolution or Linear before the last one"},
        own=(
            mean_and_variance_are_those_of_the_definition,
            filters_of_every_kernel_are_aligned,
            equal_to_scaled_weight_standardization,
            equal_to_the_layer_of_timm,
            gradients_lie_in_the_sphere_of_centred_filters,
            variance_survives_many_layers,
            a_sample_does_not_see_its_batch,
            batch_norms_are_swapped_in_the_open,
            folding_leaves_what_was_computed,
            gains_and_biases_do_not_decay,
            what_follows_in_a_chain_resumes,
            order_sees_through_no_activation,
            swaps_are_refused_in_words,
            swaps_cost_what_they_say,
        ),
    )
]
