"""Bipolar morphological layers: what they compute, how near that is, and when they are put in."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from pliant.cost import cost
from pliant.edits import Swap
from pliant.errors import EditError, ModelError
from pliant.families.layers.operations import gates, of_convolution
from pliant.methods.layers.bm_resnet import BMResNet
from pliant.nn.morphological import BMConv2d, max_plus
from pliant.run import Run, start
from pliant.testing import Case


def noise(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def converted(conv: nn.Conv2d, shift: float = 1e-6, floor: float = 1e-6) -> BMConv2d:
    model = nn.Sequential(conv)
    Swap("0", "morphological", {"shift": shift, "floor": floor}).apply(model)
    layer = model[0]
    assert isinstance(layer, BMConv2d)
    return layer


def one_term_is_exact() -> None:
    """All four signs: 1 x 1 convolutions of one channel; with shift=0.1 the leftovers are seen."""
    for sign in (1.0, -1.0):
        conv = nn.Conv2d(1, 2, 1).double()
        with torch.no_grad():
            conv.weight.copy_(sign * torch.tensor([0.7, 1.9]).view(2, 1, 1, 1))
        x = noise(3, 1, 5, 5) + 0.0
        x = torch.where(x.abs() < 0.1, 0.5, x)
        wanted = conv(x)
        assert torch.allclose(converted(conv)(x), wanted, atol=1e-4)
        far = (converted(conv, shift=0.1)(x) - wanted).abs()
        assert torch.allclose(far, 0.1 * conv.weight.abs().view(1, 2, 1, 1), atol=1e-5)


def by_hand(layer: BMConv2d, x: Tensor, conv: nn.Conv2d) -> Tensor:
    """The formula, patch by patch."""
    pads = conv._reversed_padding_repeated_twice
    patches = F.unfold(F.pad(x, pads), conv.kernel_size, conv.dilation, 0, conv.stride)
    plus, minus = layer.positive.flatten(1), layer.negative.flatten(1)
    parts = []
    for p, sign in ((patches, 1), (-patches, -1)):
        logs = p.clamp_min(layer.shift).log()[:, None]
        for kernel, side in ((plus, 1), (minus, -1)):
            parts.append(sign * side * (logs + kernel[:, :, None]).amax(2).exp())
    return sum(parts) + layer.bias[:, None]


def it_is_the_formula_for_every_geometry() -> None:
    for options in (
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2)},
        {"kernel_size": 3, "dilation": 2, "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2},
    ):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 5, **options).double()
        if options.get("padding_mode"):
            x = F.pad(noise(2, 3, 7, 6), (1, 1, 1, 1), mode="reflect")
            plain = nn.Conv2d(3, 5, 3, stride=2).double()
            given = noise(2, 3, 7, 6)
        else:
            x = given = noise(2, 3, 7, 6)
            plain = conv
        layer = converted(conv, shift=0.1)
        found = layer(given)
        assert found.shape == conv(given).shape
        assert torch.allclose(found.flatten(2), by_hand(layer, x, plain), atol=1e-12)
        with torch.no_grad():
            assert torch.equal(layer(given), found.detach())


def products_bound_what_they_stand_for() -> None:
    """M <= y <= n M of positive numbers, and the leftovers of the other branches are exact."""
    shift, floor = 0.1, 0.05
    conv = nn.Conv2d(3, 4, 2, bias=False).double()
    with torch.no_grad():
        conv.weight.copy_(noise(4, 3, 2, 2).abs() + floor)
    x = noise(2, 3, 5, 5, seed=1).abs() + shift
    patches, rows = F.unfold(x, 2), conv.weight.detach().flatten(1)
    largest = (patches[:, None] * rows[:, :, None]).amax(2)
    exact = conv(x).flatten(2)
    assert (largest <= exact + 1e-12).all() and (exact <= 12 * largest + 1e-12).all()
    found = converted(conv, shift, floor)(x).flatten(2)
    most = rows.amax(1)[:, None]
    left = largest - floor * patches.amax(1)[:, None] - shift * most + shift * floor
    assert torch.allclose(found, left, atol=1e-12)


def behind_a_rectifier_two_terms_do() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 5, 3, padding=1).double(), noise(2, 3, 6, 6).relu()
    model = nn.Sequential(conv)
    Swap("0", "morphological", {"shift": 0.1, "floor": 1e-6}).apply(model)
    whole, before = model(x), [*model.parameters()]
    Swap("0", "rectified").apply(model)
    assert torch.allclose(model(x), whole, atol=1e-12) and model[0].rectified
    assert [p is q for p, q in zip(before, model.parameters(), strict=True)] == [True, True, False]
    with pytest.raises(EditError, match="four terms"):
        Swap("0", "rectified").apply(model)


def gradients_go_to_the_largest_taps() -> None:
    """As autograd finds them through all sums; in parts, too."""
    logs, kernel = noise(3, 4, 6).requires_grad_(), noise(5, 4, seed=1).requires_grad_()
    pull = noise(3, 5, 6, seed=2)
    found = torch.autograd.grad((max_plus(logs, kernel) * pull).sum(), (logs, kernel))
    sums = (logs[:, None] + kernel[:, :, None]).amax(2)
    wanted = torch.autograd.grad((sums * pull).sum(), (logs, kernel))
    assert all(torch.allclose(one, two) for one, two in zip(found, wanted, strict=True))
    assert torch.autograd.gradcheck(max_plus, (logs, kernel))
    import pliant.nn.morphological as module

    whole, at_once = max_plus(logs, kernel), module.AT_ONCE
    try:
        module.AT_ONCE = 1
        assert torch.equal(max_plus(logs, kernel), whole)
        with torch.no_grad():
            assert torch.equal(max_plus(logs, kernel), whole)
    finally:
        module.AT_ONCE = at_once


def nothing_is_multiplied() -> None:
    """Counted: no product; 4 n sums and maxima, or half of them, and two or four exponentials."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1)
    layer = converted(conv)
    found = cost(nn.Sequential(layer), (torch.zeros(1, 3, 4, 4),))
    assert found.macs == 0 and found.params == 2 * 5 * 27 + 5 == found.bytes // 4
    outputs, taps = 5 * 16, 27
    done = layer.operations(outputs, 3 * 16)
    assert done["multiplications"] == 0 and done["maxima"] == 4 * outputs * taps
    assert done["additions"] == 4 * outputs * taps + 4 * outputs  # of the terms and the bias
    assert done["exponentials"] == 4 * outputs and done["logarithms"] == 2 * 3 * 16
    layer.rectified = True
    half = layer.operations(outputs, 3 * 16)
    assert all(2 * half[kind] == done[kind] for kind in done)
    table = {"multiplications": 10.0, "additions": 1.0}
    assert gates(of_convolution(outputs, taps), table) == 11 * outputs * taps


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)),
        *(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)),
    )


def begun(method: BMResNet, steps: int, decay: float = 0.0) -> Run:
    model = network()
    optimizer = SGD([*model.parameters()], 0.05, weight_decay=decay)
    example = (noise(2, 1, 6, 6).float(),)
    return start(model, method, example=example, optimizer=optimizer, steps=steps)


def layers_of(run: Run) -> list[nn.Module]:
    return list(run.model.children())


def step(run: Run, x: Any, labels: Tensor) -> float:
    assert run.optimizer is not None
    run.optimizer.zero_grad()
    loss = F.cross_entropy(run.model(x), labels)
    loss.backward()
    run.before_step()
    run.optimizer.step()
    run.after_step()
    return float(loss.detach())


def layers_are_converted_one_by_one() -> None:
    run, counts = begun(BMResNet(span=0.5), steps=12), []
    for _ in range(12):
        counts.append(sum(isinstance(m, BMConv2d) for m in layers_of(run)))
        step(run, noise(2, 1, 6, 6).float(), torch.tensor([0, 1]))
    assert counts == [1, 1, 2, 2, *[3] * 8]
    assert [edit.layer for edit in run.edits] == ["0", "2", "5"]
    run.finish()
    assert [m.rectified for m in layers_of(run) if isinstance(m, BMConv2d)] == [False, True, True]
    done: Any = run.log[-1]["operations"]
    assert done["multiplications"] == 0
    assert done["exponentials"] == 4 * 4 * 36 + 2 * 4 * 36 + 2 * 6 * 16


def a_part_can_be_converted() -> None:
    run = begun(BMResNet(convert=0.7, span=0), steps=4)
    assert [edit.layer for edit in run.edits] == ["0", "2"]
    assert run.reasons["5"] == "comes behind those to convert"
    run = begun(BMResNet(exclude=("0",)), steps=0)
    assert [edit.layer for edit in run.edits] == ["2", "5"]
    with pytest.raises(ModelError, match="see only and exclude"):
        begun(BMResNet(only=("9",)), steps=4)


def weight_decay_stays_off_the_logarithms() -> None:
    for decay, same in ((False, True), (True, False)):
        run = begun(BMResNet(span=0, decay=decay), steps=4, decay=0.5)
        layer: Any = layers_of(run)[0]
        before = layer.positive.detach().clone()
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.before_step()
        run.optimizer.step()  # type: ignore[union-attr]
        assert torch.allclose(layer.positive, before, atol=1e-6) == same


def it_learns() -> None:
    """Bright left or right halves of noisy images: told apart when all is converted."""
    labels = torch.arange(32) % 2
    x = 0.3 * noise(32, 1, 6, 6).float()
    x[labels == 0, :, :, :3] += 1
    x[labels == 1, :, 3:, 3:] += 1
    run = begun(BMResNet(span=0.5), steps=60)
    losses = []
    for number in range(60):
        if number == 45:  # so that the statistics of the batch norm settle
            run.optimizer.param_groups[0]["lr"] /= 10  # type: ignore[union-attr]
        losses.append(step(run, x, labels))
    run.finish()
    right = (run.model.eval()(x).argmax(1) == labels).float().mean()
    assert losses[-1] < losses[0] and right > 0.9
    assert not [m for m in layers_of(run) if type(m) is nn.Conv2d]


CASES = [
    Case(
        "bm_resnet",
        variants=("bm_resnet(convert=0.5, span=0, decay=True)",),
        refuses={
            name: "2-d convolutions" for name in ("signal", "volume", "linear", "transformer")
        },
        witnesses={
            "decay": weight_decay_stays_off_the_logarithms,
        },
        own=(
            one_term_is_exact,
            it_is_the_formula_for_every_geometry,
            products_bound_what_they_stand_for,
            behind_a_rectifier_two_terms_do,
            gradients_go_to_the_largest_taps,
            nothing_is_multiplied,
            layers_are_converted_one_by_one,
            a_part_can_be_converted,
            weight_decay_stays_off_the_logarithms,
            it_learns,
        ),
    )
]
