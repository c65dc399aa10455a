"""Dynamic skip connections: the wiring, the sizes, what depends on the input, and frozen forms."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import cost, module_cost
from pliant.data import Data
from pliant.data.ready import super_resolution
from pliant.edits import Swap
from pliant.errors import EditError, ModelError
from pliant.families.layers.trunks import coefficients
from pliant.methods.layers.dran import DRAN as Method
from pliant.nn.dynamic import (
    DynamicResidualTrunk,
    FixedResidualTrunk,
    ResidualCoefficients,
    Weighed,
    pairs,
    place,
)
from pliant.run import Run, start
from pliant.testing import Case
from pliant.testing.toys import SPECIAL, TOYS
from pliant.zoo.dran import DRAN
from tests.cases.witness import on_many


def parts_have_the_published_sizes() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in DRAN(s).parameters()) for s in (2, 3, 4)]
        side = sum(p.numel() for p in ResidualCoefficients(3, 16).parameters())
        assert sizes == [1_477_205, 1_661_845, 1_624_917] and side == 105_298
        assert [m.num_parameters for m in DRAN().trunk.modules() if isinstance(m, nn.PReLU)][
            :2
        ] == [64, 64]
        for scale in (2, 3, 4):
            model = DRAN(scale)
            assert model(torch.zeros(2, 3, 8, 6)).shape == (2, 3, 8 * scale, 6 * scale)
    with pytest.raises(ModelError, match="not 5 times"):
        DRAN(5)  # type: ignore[arg-type]


def noise(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def trunk(blocks: int = 4, width: int = 5) -> DynamicResidualTrunk:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(blocks)]
    return DynamicResidualTrunk(parts, ResidualCoefficients(width, blocks)).double()


def wiring_is_that_of_the_paper() -> None:
    model, x = trunk(), noise(2, 5, 6, 6)
    weights = torch.zeros(2, pairs(4), dtype=torch.float64)
    chain = plain = x
    for block in model.blocks:
        chain, plain = block(chain), plain + block(plain)
    assert torch.allclose(model.mixed(x, weights), chain)
    for at in range(4):
        weights[:, place(at, at)] = 1
    assert torch.allclose(model.mixed(x, weights), plain)
    weights = noise(2, pairs(4), seed=1)
    found = [x]
    for i, block in enumerate(model.blocks):
        skips = [
            weights[:, i * (i + 1) // 2 + j, None, None, None] * found[j] for j in range(i + 1)
        ]
        found.append(block(found[-1]) + sum(skips))
    assert torch.allclose(model.mixed(x, weights), found[-1])


def one_coefficient_changes_what_comes_behind() -> None:
    model, x = trunk(), noise(1, 5, 6, 6)
    for block in range(4):
        for feature in range(block + 1):
            weights = torch.full((1, pairs(4)), 0.1, dtype=torch.float64)
            before = features(model, x, weights)
            weights[:, place(block, feature)] += 0.7
            after = features(model, x, weights)
            same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert same == [at <= block for at in range(5)]


def features(model: DynamicResidualTrunk, x: Tensor, weights: Tensor) -> list[Tensor]:
    """What each block reads, and the output."""
    found: list[Tensor] = []
    hooks = [
        part.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        for part in model.blocks
    ]
    found.append(model.mixed(x, weights))
    for hook in hooks:
        hook.remove()
    return found


def coefficients_follow_the_image() -> None:
    torch.manual_seed(0)
    model, x = DRAN(2, blocks=4, width=8), torch.rand(6, 3, 12, 9)
    found = model.trunk.coefficients(x)
    assert found.shape == (6, 10) and found.std(0).min() > 0
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(model.trunk.coefficients(x[order]), found[order], atol=1e-6)
    whole = model(x)
    tile = model(x[:, :, :, :9], found)
    assert torch.allclose(tile, whole, atol=1e-6)
    assert not torch.allclose(model(x, found.flip(0)), whole, atol=1e-6)
    assert ResidualCoefficients(3, 1)(torch.rand(2, 3, 3, 3)).shape == (2, 1)


def sums_are_counted() -> None:
    sums = Weighed()
    features = [noise(3, 2, 4), noise(3, 2, 4, seed=1)]
    weights = noise(3, 2, seed=2)
    wanted = torch.einsum("fnab,nf->nab", torch.stack(features), weights)
    assert torch.allclose(sums(features, weights), wanted)
    model = nn.Sequential(trunk(blocks=3).float())
    found = cost(model, (torch.zeros(1, 5, 6, 6),))
    kernels = 3 * (25 * 9 * 36) + 5 * 1 * 9 * 36 + 1 * 3 * 9 * 9 + 3 * 6 * 9 * 1
    assert found.macs == kernels + pairs(3) * 5 * 36


def network() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(3)
    ]
    wider = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.ReLU())
    last = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.Sequential(*blocks, wider, last)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )


def begun(method: Method) -> Run:
    data = Data(train=(torch.randn(12, 3, 8, 8), torch.arange(12) % 2))
    return start(network(), method, data=data)


def a_network_begins_as_it_was() -> None:
    x, wanted = torch.randn(4, 3, 8, 8), network()
    run = begun(Method(least=1))
    assert torch.equal(run.model.eval()(x), wanted.eval()(x))
    trunks = {n: m for n, m in run.model.named_modules() if isinstance(m, DynamicResidualTrunk)}
    assert {n: len(m.blocks) for n, m in trunks.items()} == {"1.0": 3, "1.2": 1}
    run.model.train()(x).sum().backward()
    last: Any = run.model.get_submodule("1.0.coefficients.convs.2")
    assert last.weight.grad.any()
    with pytest.raises(ModelError, match="9 or more blocks"):
        begun(Method(least=9))
    with pytest.raises(ModelError, match="rows of blocks"):
        begun(Method(exclude=("1",)))


def rows_are_those_it_is_told() -> None:
    first, head, second = network(), network()[2:], network()[1]
    second[0][0] = nn.Conv2d(8, 6, 3, padding=1)  # type: ignore[index]
    model = nn.Sequential(first[0], first[1], second, *head)
    data = Data(train=(torch.randn(12, 3, 8, 8), torch.arange(12) % 2))
    for options, wanted in (({}, "12"), ({"only": ("1",)}, "1"), ({"exclude": ("1",)}, "2")):
        run = start(copy.deepcopy(model), Method(**options), data=data)
        assert "".join(edit.layer for edit in run.edits) == wanted


def frozen_wiring_is_the_mean(small: float = 0.05) -> None:
    run = begun(Method(freeze=True, small=small))
    random = torch.Generator().manual_seed(1)
    for module in run.model.modules():
        if isinstance(module, ResidualCoefficients):
            last: Any = module.convs[-1]
            with torch.no_grad():
                last.bias.copy_(torch.randn(len(last.bias), generator=random) / 5)
    [told] = coefficients(run, 12).values()
    assert len(told) >= 12
    x, means = torch.randn(4, 3, 8, 8), told.mean(0).float()
    model: Any = run.model.eval()
    inner = model[0](x)
    kept = means.where(means.abs() > small, torch.zeros(()))
    wanted = model[1][0].mixed(inner, kept.expand(4, -1))
    run.finish()
    fixed = model[1][0]
    assert isinstance(fixed, FixedResidualTrunk) and 0 < len(fixed.kept) < pairs(3)
    assert torch.allclose(fixed(inner), wanted, atol=1e-5)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def fixed_trunks_cost_what_was_predicted() -> None:
    x = torch.zeros(1, 5, 6, 6)
    for kept in ((), (1, 2, 5), tuple(range(10))):
        model = nn.Sequential(trunk().float())
        edit = Swap("0", "fixed_residual", {"kept": kept, "weights": (0.5,) * len(kept)})
        said = edit.predict(module_cost(model, (x,), "0"))
        edit.apply(model)
        found = cost(model, (x,))
        assert (found.params, found.macs, found.bytes) == (said.params, said.macs, said.bytes)
        with pytest.raises(EditError, match="to be fixed"):
            edit.apply(model)
    model = nn.Sequential(trunk().float())
    for wrong in ((2, 1), (10,), (1, 1)):
        with pytest.raises(EditError, match="rising places below 10"):
            Swap("0", "fixed_residual", {"kept": wrong, "weights": (0.5,) * len(wrong)}).apply(
                model
            )


def scenes(count: int) -> Tensor:
    """Coloured rectangles whose corners lie at even places, so that nothing of them is lost."""
    random = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 1, 1, generator=random).expand(-1, -1, 24, 24).clone()
    for image in images:
        for _ in range(5):
            top, left, high, wide = (2 * torch.randint(1, 9, (4,), generator=random)).tolist()
            image[:, top : top + high, left : left + wide] = torch.rand(3, 1, 1, generator=random)
    return images


def it_learns_to_enlarge() -> None:
    """Half a decibel above bicubic, on scenes that it has not seen."""
    sharp = scenes(144)
    coarse = F.interpolate(sharp, 12, mode="bicubic", antialias=True).clamp(0, 1)
    torch.manual_seed(0)
    model = DRAN(2, blocks=4, width=16)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for step in range(200):
        at = torch.arange(16) + 16 * (step % 8)
        optimizer.zero_grad()
        (model(coarse[at]) - sharp[at]).abs().mean().backward()
        optimizer.step()
        rates.step()
    psnr = super_resolution(border=2).metrics["PSNR"].of
    given, wanted = coarse[128:], (coarse[128:], sharp[128:])
    with torch.no_grad():
        ours = float(psnr(model(given), wanted).mean())
    bicubic = float(psnr(F.interpolate(given, 24, mode="bicubic"), wanted).mean())
    assert ours > bicubic + 0.5, (ours, bicubic)


CASES = [
    Case(
        "dran",
        variants=("dran(least=1, freeze=True)", "dran(freeze=True, small=1000)"),
        toys=("mobile",),
        refuses={name: "rows of blocks" for name in TOYS},
        witnesses={
            "only": rows_are_those_it_is_told,
            "exclude": rows_are_those_it_is_told,
            "samples": on_many("dran(freeze=True)", "samples", toy=SPECIAL["mobile"]),
        },
        own=(
            parts_have_the_published_sizes,
            wiring_is_that_of_the_paper,
            one_coefficient_changes_what_comes_behind,
            coefficients_follow_the_image,
            sums_are_counted,
            a_network_begins_as_it_was,
            frozen_wiring_is_the_mean,
            fixed_trunks_cost_what_was_predicted,
            it_learns_to_enlarge,
        ),
    )
]
