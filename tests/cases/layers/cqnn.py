"""Quadratic convolutions: the form itself, its symmetric half, low ranks, and what one can tell."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from pliant.cost import cost
from pliant.edits import Swap
from pliant.errors import EditError, ModelError
from pliant.methods.layers.cqnn import CQNN
from pliant.nn.quadratic import QuadraticConv2d, QuadraticFactors, matrices_of
from pliant.run import Run, start
from pliant.testing import Case


def noise(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


GEOMETRIES: tuple[dict[str, Any], ...] = (
    *({"padding": 1}, {"padding": 1, "stride": 2}, {"padding": (0, 2), "stride": (2, 1)}),
    *({"padding": "same", "dilation": 2}, {"padding": 1, "padding_mode": "reflect"}),
)


def swapped(module: nn.Module, kind: str, /, **spec: Any) -> Any:
    model = nn.Sequential(module)
    Swap("0", kind, spec).apply(model)
    return model[0]


def convolution(bias: bool = True, **geometry: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(2, 3, 3, **geometry, bias=bias).double()


def full(negative: bool = True, **geometry: Any) -> QuadraticConv2d:
    layer = swapped(
        convolution(**geometry), "quadratic", form="full", negative=negative, random=True
    )
    assert isinstance(layer, QuadraticConv2d)
    return layer


def without_a_quadratic_part_it_is_a_convolution() -> None:
    """Of any geometry, at the borders too, where the 1 stays 1."""
    for geometry in GEOMETRIES:
        for bias in (True, False):
            conv = convolution(bias, **geometry)
            for size in ((6, 6), (7, 5)):
                x = noise(2, 2, *size)
                wanted = conv(x)
                for form in ("full", "symmetric"):
                    for negative in (True, False):
                        layer = swapped(
                            conv, "quadratic", form=form, negative=negative, random=False
                        )
                        assert torch.allclose(layer(x), wanted, atol=1e-10)
                for rank in (2, 3):
                    conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                    low = swapped(conv, "quadratic_factors", rank=rank, random=False)
                    assert torch.allclose(low(x), wanted, atol=1e-10)
    conv = convolution()
    turned = QuadraticConv2d(2, 3, (3, 3)).double()
    turned.set_matrices(matrices_of(conv, negative=False))
    assert torch.allclose(turned(noise(2, 2, 6, 6)), -conv(noise(2, 2, 6, 6)), atol=1e-10)


def it_is_the_form_of_every_patch() -> None:
    """-z^T Q z, patch by patch; Q need not be symmetric."""
    for geometry in GEOMETRIES[:4]:
        layer, conv = full(**geometry), convolution(**geometry)
        with torch.no_grad():
            layer.weight.copy_(noise(3, 19, 19, seed=1))
        x = noise(2, 2, 6, 5)
        around = F.pad(x, conv._reversed_padding_repeated_twice)
        patches = F.unfold(around, 3, conv.dilation, 0, conv.stride)
        found = layer(x)
        assert found.shape == conv(x).shape
        for sample in range(2):
            for place in range(patches.shape[2]):
                z = torch.cat([patches[sample, :, place], torch.ones(1).double()])
                for output in range(3):
                    wanted = -(z @ layer.weight[output] @ z)
                    got = found[sample, output].flatten()[place]
                    assert torch.isclose(got, wanted, atol=1e-10)


def the_symmetric_form_is_the_same_function() -> None:
    layer, x = full(padding=1), noise(2, 2, 6, 5)
    with torch.no_grad():
        layer.weight.copy_(noise(3, 19, 19, seed=1))
    wanted, turned = layer(x), layer.matrices()
    half = swapped(layer, "quadratic", form="symmetric", negative=True, random=False)
    assert half.weight.shape == (3, 19 * 20 // 2)
    assert torch.allclose(half(x), wanted) and torch.allclose(half.matrices(), turned)
    import pliant.nn.quadratic as module

    whole, at_once = layer(x), module.AT_ONCE
    try:
        module.AT_ONCE = 1  # an output at a time
        assert torch.allclose(layer(x), whole)
    finally:
        module.AT_ONCE = at_once


def low_ranks_come_nearer_and_end_in_it() -> None:
    """The error falls with the rank, within the sum of what is missing; all terms are exact."""
    layer, x = full(padding=1), noise(2, 2, 6, 5)
    wanted = layer(x)
    values = torch.linalg.eigvalsh(layer.matrices()).abs().sort(1, descending=True).values
    patches = F.unfold(x, 3, padding=1)
    squares = patches.square().sum(1) + 1
    last = torch.tensor(torch.inf).double()
    for rank in (1, 4, 8, 13, 18, 19):
        low = swapped(layer, "quadratic_factors", rank=rank, random=False)
        gap = (low(x) - wanted).flatten(2).abs()
        missing = values[:, rank:].sum(1)
        assert (gap <= missing[None, :, None] * squares[:, None] + 1e-9).all()
        assert gap.square().mean() < last
        last = gap.square().mean()
        assert [type(m) for m in low.children()] == [nn.Conv2d, nn.Conv2d]
    assert last < 1e-10
    with pytest.raises(EditError, match="rank of 1 to 19, not 20"):
        swapped(layer, "quadratic_factors", rank=20, random=False)


def weights_and_products_are_counted() -> None:
    """(n+1)^2 or half of it for each output; in low rank n+2 for each term."""
    x = torch.zeros(1, 2, 6, 5).double()
    conv = convolution(padding=1)
    for form, params, each in (("full", 19 * 19, 19 * 20 * 3), ("symmetric", 190, 190 * 4)):
        layer = swapped(conv, "quadratic", form=form, negative=True, random=False)
        found = cost(nn.Sequential(layer), (x,))
        assert (found.params, found.macs) == (3 * params, 30 * each)
    low = swapped(conv, "quadratic_factors", rank=4, random=False)
    found = cost(nn.Sequential(low), (x,))
    assert (found.params, found.macs) == (3 * 4 * (19 + 1), 30 * 3 * 4 * (18 + 1))
    counts = []  # the convolutions of the paper's small network for CIFAR
    for inputs, outputs in ((3, 32), (32, 32), (32, 64), (64, 64)):
        counts.append(outputs * (9 * inputs + 1) ** 2)
    assert counts == [25088, 2672672, 5345344, 21307456]
    for inputs, outputs in ((3, 32),):
        assert QuadraticConv2d(inputs, outputs, (3, 3)).weight.numel() == counts[0]


def it_begins_as_glorot_has_it() -> None:
    torch.manual_seed(0)
    layer = QuadraticConv2d(4, 6, (3, 3))
    limit = (3 / (37 * 6)) ** 0.5
    diagonal = layer.weight.diagonal(dim1=1, dim2=2)
    assert torch.equal(layer.weight, layer.weight.mT)
    assert 0.9 * limit < diagonal.abs().max() <= limit
    assert float(layer.weight.detach().std()) == pytest.approx(limit / 3**0.5 / 2**0.5, rel=0.05)


def told_apart(layer: nn.Module, points: Tensor, labels: Tensor) -> float:
    """The accuracy of one trained neuron that reads two numbers."""
    optimizer = Adam(layer.parameters(), 0.1)
    x = points.float()[:, :, None, None]
    for _ in range(200):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(layer(x).flatten(), labels).backward()
        optimizer.step()
    return float(((layer(x).flatten() > 0) == labels.bool()).float().mean())


def one_neuron_tells_what_a_linear_one_cannot() -> None:
    """XOR, and a ring around a disc."""
    corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    angles = torch.linspace(0, 6.2, 60)
    radii = torch.where(torch.arange(60) % 2 == 0, 0.5, 1.5)
    rings = torch.stack([radii * angles.cos(), radii * angles.sin()], 1)
    for points, labels in (
        (corners, torch.tensor([0.0, 1, 1, 0])),
        (rings, (radii > 1).float()),
    ):
        torch.manual_seed(0)
        assert told_apart(QuadraticConv2d(2, 1, (1, 1)), points, labels) == 1.0
        assert told_apart(nn.Conv2d(2, 1, 1), points, labels) <= 0.75


def half_precision_computes_in_single() -> None:
    layer = QuadraticConv2d(1, 1, (1, 1), negative=False)
    layer.set_matrices(torch.eye(2)[None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(torch.full((1, 1, 1, 1), 1000.5))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(1000.5**2 + 1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )


def begun(method: CQNN) -> Run:
    model = network()
    optimizer = SGD([*model.parameters()], 0.05)
    example = (noise(2, 1, 6, 6).float(),)
    return start(model, method, example=example, optimizer=optimizer, steps=4)


def a_network_goes_on_where_it_was() -> None:
    """Exactly as before at the start, then the quadratic part learns; it ends symmetric."""
    for method in (CQNN(), CQNN(form="symmetric", negative=False), CQNN(form="lowrank")):
        run, x = begun(method), noise(2, 1, 6, 6).float()
        dense = network()
        assert torch.allclose(run.model(x), dense(x), atol=1e-5)
        for _ in range(4):
            run.optimizer.zero_grad()  # type: ignore[union-attr]
            F.cross_entropy(run.model(x), torch.tensor([0, 1])).backward()
            run.before_step()
            run.optimizer.step()  # type: ignore[union-attr]
            run.after_step()
        before = run.model(x)
        run.finish()
        assert torch.allclose(run.model(x), before, atol=1e-6)
        layer: Any = run.model.get_submodule("0")
        if isinstance(layer, QuadraticFactors):
            continue
        assert layer.form == "symmetric"
        assert layer.matrices()[:, :-1, :-1].abs().max() > 1e-6


def what_is_too_large_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"2 would have 3,136 .*use cqnn\(form=\"lowrank\", rank=4"
    ):
        begun(CQNN(most=3000))
    begun(CQNN(most=3000, form="symmetric"))
    begun(CQNN(most=3000, form="lowrank"))
    wide = nn.Conv2d(512, 512, 3, device="meta")
    with pytest.raises(EditError, match="lower rank"):
        swapped(wide, "quadratic", form="full", negative=True, random=True)
    with pytest.raises(ModelError, match="see only and exclude"):
        begun(CQNN(only=("6",)))


CASES = [
    Case(
        "cqnn",
        variants=(
            "cqnn(form='lowrank', rank=3)",
            "cqnn(form='symmetric', begin='random', negative=False)",
        ),
        refuses={
            name: "2-d convolutions" for name in ("signal", "volume", "linear", "transformer")
        },
        witnesses={
            "most": what_is_too_large_is_refused,
        },
        own=(
            without_a_quadratic_part_it_is_a_convolution,
            it_is_the_form_of_every_patch,
            the_symmetric_form_is_the_same_function,
            low_ranks_come_nearer_and_end_in_it,
            weights_and_products_are_counted,
            it_begins_as_glorot_has_it,
            one_neuron_tells_what_a_linear_one_cannot,
            half_precision_computes_in_single,
            a_network_goes_on_where_it_was,
            what_is_too_large_is_refused,
        ),
    )
]
