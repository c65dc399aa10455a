"""Shift attention: what is left of a kernel, how the shifts compute it, and the temperature."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from pliant.cost import cost
from pliant.edits import Swap
from pliant.errors import EditError, MethodError, ModelError
from pliant.methods.layers.shift_attention import ShiftAttention
from pliant.nn.shifted import ShiftAttentionConv2d, ShiftConv2d
from pliant.run import Run, start
from pliant.testing import Case


def noise(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random)


def attending(shared: bool, bias: bool = True, **geometry: Any) -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, **{"kernel_size": 3, "padding": 1, **geometry}, bias=bias)
    model = nn.Sequential(conv)
    spec = {"shared": shared, "temperature": 20.0, "magnitude": False}
    Swap("0", "shift_attention", spec).apply(model)
    return model


def the_attention_is_that_of_the_definition() -> None:
    """A softmax of T A / std A; the scale of A changes nothing, and the kernel is S * W."""
    for shared in (False, True):
        model: Any = attending(shared)
        layer: ShiftAttentionConv2d = model[0].train()
        a = layer.attention.detach()
        assert (a >= 0).all() and (a < 1).all() and a.shape == (1 if shared else 5, 3, 9)
        wanted = torch.softmax(20 * a / a.std(2, unbiased=True)[:, :, None], 2)
        assert torch.allclose(layer.shares(), wanted)
        kernel = wanted.view(-1, 3, 3, 3) * layer.weight
        x = noise(2, 3, 6, 7)
        assert torch.allclose(model(x), F.conv2d(x, kernel, layer.bias, 1, 1), atol=1e-6)
        with torch.no_grad():
            layer.attention.mul_(7)
        assert torch.allclose(layer.shares(), wanted, atol=1e-5)
        model(x).square().sum().backward()
        assert layer.attention.grad is not None and layer.attention.grad.any()
        with torch.no_grad():
            layer.attention.fill_(0.5)  # no spread: all taps alike
        assert torch.allclose(layer.shares(), torch.tensor(1 / 9))


def one_tap_is_left_and_shifts_compute_it() -> None:
    """The gather form, written out, is the convolution with the hardened kernel."""
    for shared in (False, True):
        for geometry in (
            *({"stride": 1}, {"stride": 2}, {"stride": (2, 1), "padding": (0, 2)}),
            *({"kernel_size": 5, "padding": 2}, {"padding": "same"}, {"kernel_size": (1, 3)}),
            {"padding_mode": "circular"},
        ):
            model: Any = attending(shared, **geometry)
            soft: ShiftAttentionConv2d = copy.deepcopy(model[0])
            Swap("0", "shift", {"shared": shared}).apply(model)
            layer: ShiftConv2d = model[0]
            kernel = layer.kernel()
            assert ((kernel != 0).flatten(2).sum(2) == 1).all()
            taps, own = soft.taps().expand(5, -1), soft.weight.flatten(2)
            assert torch.equal(
                kernel.flatten(2).gather(2, taps[:, :, None]), own.gather(2, taps[:, :, None])
            )
            for size in ((6, 8), (7, 5)):
                x = noise(2, 3, *size)
                wanted = F.conv2d(soft.padded(x), kernel, layer.bias, layer.stride)
                assert torch.allclose(model(x), wanted, atol=1e-5)
                assert torch.allclose(
                    soft.eval()(x), F.conv2d(soft.padded(x), kernel, layer.bias, layer.stride)
                )


def what_is_kept_follows_its_tensors() -> None:
    """Made once in evaluation without gradients; changes of weights, size and type are seen."""
    for shared, hard in ((False, False), (False, True), (True, True)):
        model: Any = attending(shared, bias=False)
        if hard:
            Swap("0", "shift", {"shared": shared}).apply(model)
        layer, x, made = model[0].eval(), noise(2, 3, 6, 7), list[int]()
        taps = layer.taps
        layer.taps = lambda taps=taps, made=made: made.append(1) or taps()
        with torch.no_grad():
            first = model(x)
            assert torch.equal(first, model(x)) and len(made) == 1
            assert model(noise(1, 3, 9, 5)).shape == (1, 5, 9, 5)
            assert torch.equal(first, model(x))
            layer.weight.mul_(2)
            assert torch.allclose(model(x), 2 * first)
            assert torch.allclose(model.double()(x.double()).float(), 2 * first, atol=1e-5)
            model.float()
        model(x).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.any()
        with torch.no_grad():
            model(x)
        del layer.taps
        assert layer._kept is not None and copy.deepcopy(layer)._kept is None
        assert layer.train()._kept is None


def shifted_by_hand(x: Tensor, layer: ShiftConv2d) -> Tensor:
    """sum_i v[o,i] x[i, h + dh, w + dw], zero outside of the image."""
    taps, found = layer.taps().expand(5, -1), torch.zeros(len(x), 5, *x.shape[2:])
    for o in range(5):
        for i in range(3):
            dh, dw = int(taps[o, i]) // 3 - 1, int(taps[o, i]) % 3 - 1
            for h in range(x.shape[2]):
                for w in range(x.shape[3]):
                    if 0 <= h + dh < x.shape[2] and 0 <= w + dw < x.shape[3]:
                        found[:, o, h, w] += layer.weight[o, i].detach() * x[:, i, h + dh, w + dw]
    return found


def a_shift_has_zeros_outside() -> None:
    for shared in (False, True):
        model: Any = attending(shared, bias=False)
        Swap("0", "shift", {"shared": shared}).apply(model)
        x = noise(2, 3, 4, 5)
        assert torch.allclose(model(x), shifted_by_hand(x, model[0]), atol=1e-5)


def shared_shifts_are_shifts_and_a_pointwise_convolution() -> None:
    model: Any = attending(True)
    Swap("0", "shift", {"shared": True}).apply(model)
    layer, x = model[0], noise(2, 3, 6, 7)
    around = F.pad(x, (1, 1, 1, 1))
    parts = []
    for channel, tap in enumerate(layer.taps()[0].tolist()):
        parts.append(around[:, channel, tap // 3 : tap // 3 + 6, tap % 3 : tap % 3 + 7])
    moved = torch.stack(parts, 1)
    assert torch.equal(layer.shifted(around), moved)
    pointwise = nn.Conv2d(3, 5, 1)
    with torch.no_grad():
        pointwise.weight.copy_(layer.weight[:, :, None, None])
        pointwise.bias.copy_(layer.bias)  # type: ignore[union-attr]
    assert torch.allclose(model(x), pointwise(moved), atol=1e-5)


def costs_are_a_ninth_and_four_bits() -> None:
    """Weights and MACs of Co Ci; 36 bits for each pair of channels, or 4 for each channel."""
    x = torch.zeros(1, 3, 6, 7)
    for shared, index in ((False, 8), (True, 2)):  # bytes of 15 taps or of 3
        model: Any = attending(shared, bias=False)
        dense = cost(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False)), (x,))
        Swap("0", "shift", {"shared": shared}).apply(model)
        found = cost(model, (x,))
        assert found.macs == dense.macs // 9 == 15 * 42
        assert found.params == 15 and found.bytes == 4 * 15 + index


def network(*, norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()]
    parts += [nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


def begun(method: ShiftAttention, steps: int = 8) -> Run:
    model = network().train()
    optimizer = SGD([*model.parameters()], 0.05)
    example = (noise(2, 1, 6, 6),)
    return start(model, method, example=example, optimizer=optimizer, steps=steps)


def step(run: Run, x: Tensor, labels: Tensor) -> None:
    assert run.optimizer is not None
    run.optimizer.zero_grad()
    F.cross_entropy(run.model(x), labels).backward()
    run.before_step()
    run.optimizer.step()
    run.after_step()


def the_temperature_grows_by_a_factor_at_every_step() -> None:
    run = begun(ShiftAttention(), steps=9)
    layer: Any = run.model.get_submodule("2")
    run.optimizer.param_groups[0]["lr"] = 0.0  # type: ignore[union-attr]
    found, sharp = [float(layer.temperature)], []
    for _ in range(9):
        step(run, noise(4, 1, 6, 6), torch.arange(4) % 2)
        run.after_epoch()
        found.append(float(layer.temperature))
        sharp.append(run.log[-1]["sharpness"])
    factors = [after / before for before, after in zip(found, found[1:], strict=False)]
    assert factors == pytest.approx([math.exp(math.log(70 / 20) / 9)] * 9, rel=1e-5)
    assert found[-1] == pytest.approx(70, rel=1e-6)
    assert sharp == sorted(sharp) and run.log[-1]["settled"] > 0.5
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}  # type: ignore[union-attr]
    assert id(layer.attention) in held and "temperature" in layer.state_dict()
    run.finish()
    assert isinstance(run.model.get_submodule("2"), ShiftConv2d)
    assert run.reasons["0"] == "the first layer stays a convolution"
    assert "1 x 1" in run.reasons["5"]


def strong_taps_can_be_the_first() -> None:
    for shared in (False, True):
        method, dense = ShiftAttention(scores="magnitude", shared=shared), network()
        run = begun(method)
        layer: Any = run.model.get_submodule("2")
        strong = dense[2].weight.abs().flatten(2)  # type: ignore[operator]
        strong = strong.mean(0, keepdim=True) if shared else strong
        assert torch.equal(layer.taps(), strong.argmax(2))


def what_cannot_shift_is_refused() -> None:
    for conv in (
        *(nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 3, groups=2)),
        *(nn.Conv2d(3, 4, 3, dilation=2), nn.Conv1d(3, 4, 3)),
    ):
        spec = {"shared": False, "temperature": 20.0, "magnitude": False}
        with pytest.raises(EditError, match="odd kernel"):
            Swap("0", "shift_attention", spec).apply(nn.Sequential(conv))
    with pytest.raises(EditError, match="same sharing"):
        Swap("0", "shift", {"shared": True}).apply(attending(False))
    with pytest.raises(MethodError, match="let end be the larger"):
        begun(ShiftAttention(start=30, end=20))
    with pytest.raises(ModelError, match="none that it may take"):
        begun(ShiftAttention(only=("5",)))


CASES = [
    Case(
        "shift_attention",
        variants=("shift_attention(shared=True, stem=True, scores='magnitude')",),
        refuses={
            name: "none that it may take"
            for name in ("signal", "volume", "linear", "transformer", "single")
        },
        own=(
            the_attention_is_that_of_the_definition,
            one_tap_is_left_and_shifts_compute_it,
            a_shift_has_zeros_outside,
            what_is_kept_follows_its_tensors,
            shared_shifts_are_shifts_and_a_pointwise_convolution,
            costs_are_a_ninth_and_four_bits,
            the_temperature_grows_by_a_factor_at_every_step,
            strong_taps_can_be_the_first,
            what_cannot_shift_is_refused,
        ),
    )
]
