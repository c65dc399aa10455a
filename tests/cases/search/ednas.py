"""Kernel sizes: merged kernels against separate branches, and tasks whose best size is known."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import cost
from pliant.data import Data
from pliant.edits import Swap
from pliant.errors import EditError, MethodError
from pliant.families.search.bilevel import choices
from pliant.families.search.expected import Expected
from pliant.methods.search.ednas import EDNAS
from pliant.nn.meta_kernel import MetaKernel
from pliant.registry import build
from pliant.run import start
from pliant.testing import Case
from pliant.testing.toys import TOYS

SIZES = (3, 5, 7)
SPEC = {"sizes": SIZES, "nested": False}


def meta(layer: nn.Conv2d, *, nested: bool = False) -> MetaKernel:
    model = nn.Sequential(layer)
    Swap("0", "meta_kernel", {**SPEC, "nested": nested}).apply(model)
    found = model[0]
    assert isinstance(found, MetaKernel)
    return found


def _branches(part: MetaKernel, x: Tensor) -> Tensor:
    """What separate convolutions give, each with padding of its own, centred alike."""
    reach, total = SIZES[-1] // 2, torch.zeros(())
    rows = zip(part.probabilities().unbind(), part.kernels().items(), strict=True)
    for share, (size, kernel) in rows:
        edge = reach - size // 2  # the padding that all share, and what this one leaves of it
        padded = F.pad(x, [reach] * 4)
        inner = padded[..., edge : padded.shape[-2] - edge, edge : padded.shape[-1] - edge]
        total = total + share * F.conv2d(inner, kernel, None, part.stride, 0, 1, part.groups)
    return total + part.bias[:, None, None]


def one_merged_convolution_is_the_sum_of_all() -> None:
    """Stride 1 and 2, dense and depthwise, odd and even sides: values and gradients."""
    for stride, groups, side in itertools.product((1, 2), (1, 4), (7, 8)):
        layer = nn.Conv2d(4, 8, 5, stride, 2, groups=groups, dtype=torch.float64)
        part, x = meta(layer), torch.randn(2, 4, side, side, dtype=torch.float64)
        part.logits.requires_grad_(True).data.normal_()
        own = [part.logits, part.kernel3, part.kernel5, part.weight]
        merged, apart = part(x), _branches(part, x)
        pull = torch.randn_like(merged)
        assert torch.allclose(merged, apart, rtol=1e-12, atol=1e-12)
        one, other = (torch.autograd.grad((out * pull).sum(), own) for out in (merged, apart))
        for a, b in zip(one, other, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


def the_gradient_of_a_share_is_its_lead_over_the_mean() -> None:
    """dL/da_s = p_s / tau (<G, K_s> - sum_r p_r <G, K_r>) with G = dL/dM."""
    part = meta(nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64))
    part.logits.requires_grad_(True).data.copy_(torch.tensor([0.3, -0.2, 0.1]))
    part.temperature.fill_(0.7)
    pull = torch.randn(2, 2, 7, 7, dtype=torch.float64)
    (found,) = torch.autograd.grad((part.merged() * pull).sum(), [part.logits])
    shares = part.probabilities().detach()
    leads = torch.stack([(pull * part._centred(k)).sum() for k in part.kernels().values()]).detach()
    assert torch.allclose(found, shares / 0.7 * (leads - shares @ leads), atol=1e-12)


def a_search_multiplies_as_often_as_the_largest_kernel() -> None:
    """The ratio to one 7x7 network is 1; mixing what 3x3, 5x5 and 7x7 give would cost 83 / 49."""
    x = (torch.zeros(1, 4, 8, 8),)
    layer = nn.Conv2d(4, 4, 7, padding=3, groups=4, bias=False)
    largest = cost(nn.Sequential(layer), x).macs
    assert cost(nn.Sequential(meta(layer)), x).macs == largest
    each = [nn.Conv2d(4, 4, s, padding=s // 2, groups=4, bias=False) for s in SIZES]
    assert sum(cost(nn.Sequential(one), x).macs for one in each) * 49 == 83 * largest


def a_one_hot_kernel_is_the_convolution_that_is_left() -> None:
    layer, x = nn.Conv2d(4, 4, 5, 2, 2, groups=4), torch.randn(2, 4, 9, 9)
    before, part = layer(x), meta(layer)
    part.logits.copy_(torch.tensor([0.0, 1e4, 0.0]))
    assert torch.allclose(part(x), before, atol=1e-6)  # it begins with the layer's own weights
    model = nn.Sequential(part)
    Swap("0", "cropped", {"size": 5, "bias": True}).apply(model)
    assert type(model[0]) is nn.Conv2d and torch.allclose(model(x), before, atol=1e-6)
    for size, bias in ((9, True), (3, False)):
        with pytest.raises(EditError):
            Swap("0", "cropped", {"size": size, "bias": bias}).apply(nn.Sequential(part))


def rings_belong_to_a_nested_kernel_above_their_thresholds() -> None:
    """An outer ring counts only where all within do; the shares are one-hot."""
    part = meta(nn.Conv2d(2, 2, 7, padding=3, bias=False), nested=True)
    with torch.no_grad():
        part.weight.fill_(1.0)  # two filters of two channels: rings of 2 * 16 and 2 * 24
    for thresholds, size in (((0, 0), 7), ((0, 49), 5), ((31, 47), 7), ((33, 0), 3), ((33, 49), 3)):
        part.logits.copy_(torch.tensor(thresholds))
        assert part.best() == str(size) and part.probabilities().sum() == 1
        assert part.merged().count_nonzero() == 2 * 2 * size**2
    part.logits.requires_grad_(True).data.copy_(torch.tensor([33.0, 47.0]))
    (found,) = torch.autograd.grad(part.probabilities()[0], [part.logits])
    soft = torch.tensor(-1.0).sigmoid()  # of the ring's 32 - 33
    assert torch.allclose(found, torch.stack([soft * (1 - soft), torch.tensor(0.0)]))


def _pairs(seed: int, extent: int) -> Data:
    """Noise whose pixels are alike or opposite at a distance that fits into kernels of an extent.

    A smaller kernel sees independent pixels, whatever the class.
    """
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(512) % 2
    images = torch.randn(512, 1, 13, 13, generator=g)
    images = images + (2.0 * labels - 1)[:, None, None, None] * images.roll(extent - 1, -1)
    return Data((images[:256], labels[:256]), (images[256:], labels[256:]), classes=2)


def _found(seed: int, extent: int, method: EDNAS, steps: int = 60) -> int:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    data = _pairs(seed, extent)
    run = start(model, method, data=data, steps=steps, seed=seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, 0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data.train[0]), data.train[1]).backward()
        optimizer.step()
        run.after_step()
    run.finish()
    return int(run.edits[-1].spec["size"])  # type: ignore[attr-defined]


def the_reach_of_a_pattern_is_found() -> None:
    """Where cost hardly counts; where it is all that counts, the least size."""
    cheap = EDNAS(scope="all", strength=0.03, alpha_lr=0.1, start=1.0, alpha_decay=0.0)
    dear = EDNAS(scope="all", strength=10.0, alpha_lr=0.1, start=1.0)
    assert [_found(seed, 7, cheap) for seed in range(2)] == [7, 7]
    assert _found(0, 3, cheap) == _found(0, 7, dear) == 3


def the_expected_cost_counts_every_call() -> None:
    """One-hot shares cost what the derived network does, where a layer is called twice too."""
    toy = TOYS["shared"]
    for axis in ("macs", "params"):
        model = toy.model()
        run = start(model, EDNAS(scope="all", by=axis), example=toy.inputs(1))  # type: ignore[arg-type]
        for place, part in enumerate(choices(model).values()):
            part.logits.fill_(-1e4)[2 - place] = 0.0
        predicted = float(Expected.from_plain(run.state["expected"]).of(model))
        run.finish()
        assert run.log[-1]["sizes"] == {"stem": 7, "twice": 5}
        assert predicted == getattr(cost(model, toy.inputs(1)), axis)


def shares_sharpen_after_the_warm_up() -> None:
    """From 4 to 1 by half of its logarithm at the middle of what is left."""
    toy = TOYS["grouped"]
    method = EDNAS(start=4.0, end=1.0, warmup=0.5, batch=4)
    run, seen = start(toy.model(), method, data=toy.data(), steps=4), []
    for _ in range(4):
        seen.append(float(next(iter(choices(run.model).values())).temperature))
        run.after_step()
    seen.append(float(next(iter(choices(run.model).values())).temperature))
    assert seen == pytest.approx([4, 4, 4, 2, 1])


def what_cannot_be_merged_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4))
    x = (torch.zeros(1, 4, 6, 6),)
    for sizes in ((3,), (3, 4), (5, 3), (3, 13)):
        with pytest.raises(MethodError, match="two or more odd sizes"):
            start(model, EDNAS(sizes=sizes), example=x)
    with pytest.raises(MethodError, match="none was named"):
        start(model, EDNAS(by="latency"), example=x)
    for wrong in (
        nn.Conv2d(4, 4, 4),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    ):
        with pytest.raises(EditError, match="keeps a centre"):
            Swap("0", "meta_kernel", SPEC).apply(nn.Sequential(wrong))


def fresh_weights_are_not_those_of_the_search() -> None:
    found = []
    for spec in ("ednas", "ednas(weights='fresh')"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Flatten())
        start(model, build(spec), example=(torch.zeros(1, 4, 6, 6),)).finish()
        assert not choices(model)
        found.append(model[0].weight)
    assert found[0].shape == found[1].shape and not torch.equal(*found)


CASES = [
    Case(
        "ednas",
        spec="ednas(batch=4)",
        variants=("ednas(batch=4, mode='nested', scope='all')", "ednas(batch=4, weights='fresh')"),
        toys=("grouped",),
        refuses={name: "depthwise convolution" for name in TOYS if name != "grouped"},
        witnesses={
            "sizes": what_cannot_be_merged_is_refused,
        },
        own=(
            one_merged_convolution_is_the_sum_of_all,
            the_gradient_of_a_share_is_its_lead_over_the_mean,
            a_search_multiplies_as_often_as_the_largest_kernel,
            a_one_hot_kernel_is_the_convolution_that_is_left,
            rings_belong_to_a_nested_kernel_above_their_thresholds,
            the_reach_of_a_pattern_is_found,
            the_expected_cost_counts_every_call,
            shares_sharpen_after_the_warm_up,
            what_cannot_be_merged_is_refused,
            fresh_weights_are_not_those_of_the_search,
        ),
    ),
]
