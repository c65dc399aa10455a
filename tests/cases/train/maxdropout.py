"""MaxDropout: which units leave, what gradients see, and how many that are."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from pliant.errors import MethodError, ModelError
from pliant.methods.train.maxdropout import MaxDropout
from pliant.nn.maxdropout import MaxDropout as Layer
from pliant.nn.maxdropout import largest
from pliant.run import Run, start
from pliant.testing import Case


def noise(*shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def the_top_of_the_range_is_set_to_zero() -> None:
    """{X > min + (1 - r)(max - min)}; survivors are what they were, to the last bit."""
    for seed, drop in enumerate((0.1, 0.3, 0.5, 0.8)):
        x = noise(4, 3, 5, 5, seed=seed)
        array = x.numpy()
        top = array > array.min() + (1 - drop) * (array.max() - array.min())
        found = Layer(drop)(x)
        assert np.array_equal(found.numpy(), np.where(top, 0, array)) and top.any()
        assert found.flatten()[x.argmax()] == 0


def the_ends_of_the_rate() -> None:
    x = noise(4, 8).float()
    assert torch.equal(Layer(0.0)(x), x)
    assert (Layer(1.0)(x) != 0).sum() == 1 and Layer(1.0)(x).min() == x.min()
    flat = torch.full((2, 3), 5.0)
    for drop in (0.0, 0.5, 1.0):
        assert torch.equal(Layer(drop)(flat), flat)
    with pytest.raises(ValueError, match=r"drop must be in 0\.\.1, not 1\.5"):
        Layer(1.5)
    with pytest.raises(MethodError, match=r"drop must be float in 0\.\.1, not 1\.5"):
        start(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), MaxDropout(1.5), example=(x[:, :2],))


def scale_and_offset_change_nothing() -> None:
    x = noise(6, 4, 3, seed=1)
    for scope in ("tensor", "sample", "channel"):
        mask = largest(x, 0.4, scope=scope)
        assert torch.equal(largest(4 * x + 2, 0.4, scope=scope), mask) and mask.any()
    alone = [largest(row[None], 0.4) for row in x]
    assert torch.equal(largest(x, 0.4, scope="sample"), torch.cat(alone))
    apart = [largest(x[:, [channel]], 0.4) for channel in range(4)]
    assert torch.equal(largest(x, 0.4, scope="channel"), torch.cat(apart, 1))
    assert torch.equal(largest(x, 0.4, "l2-random"), x / x.norm() > 0.6 * (x / x.norm()).max())


def gradients_are_those_of_a_masked_fill() -> None:
    """G where a unit stays and 0 elsewhere; none goes through the range."""
    x, pulls = noise(5, 7).requires_grad_(), noise(5, 7, seed=1)
    (Layer(0.6)(x) * pulls).sum().backward()
    mask = largest(x, 0.6)
    other = x.detach().clone().requires_grad_()
    (other.masked_fill(mask, 0.0) * pulls).sum().backward()
    assert x.grad is not None and other.grad is not None
    assert torch.equal(x.grad, other.grad) and torch.equal(x.grad, pulls * ~mask)


def the_share_that_is_dropped_is_not_the_rate() -> None:
    """Of a million rectified normal numbers: 4e-4, 9e-3 and 0.17; the fewer the more there are."""
    x = noise(1_000_000).relu().float()[None]
    for drop, share in ((0.3, 4.3e-4), (0.5, 8.8e-3), (0.8, 0.171)):
        layer = Layer(drop)
        layer(x)
        assert share / 2 < layer.last_drop_fraction < 2 * share
    few = np.mean([float(largest(part, 0.5).double().mean()) for part in x[0].split(100)])
    assert few > 3 * float(largest(x, 0.5).double().mean())


def half_precision_is_compared_in_single() -> None:
    x = (60000 * noise(64).abs().clamp(max=1)).half()[None]
    x[0, 0] = -60000
    assert torch.equal(largest(x, 0.3), largest(x.float(), 0.3)) and largest(x, 0.3).any()


def the_layer_is_nothing_in_evaluation() -> None:
    x, layer = noise(3, 4).float(), Layer(0.5).eval()
    assert layer(x) is x and not list(layer.state_dict())
    assert (Layer(0.5, apply_in_eval=True).eval()(x) == 0).any()
    scripted = torch.jit.script(Layer(0.5))
    assert torch.equal(scripted(x), Layer(0.5)(x))


def begun(model: nn.Module, method: MaxDropout, *shape: int) -> Run:
    optimizer = SGD([*model.parameters()], 0.1)
    return start(model, method, example=(noise(2, *shape).float(),), optimizer=optimizer, steps=9)


def it_takes_the_place_of_dropouts() -> None:
    """They rest while it works, those that write in place too; then all is as before."""
    for inplace in (False, True):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.9, inplace), nn.Linear(8, 3))
        x = noise(5, 6).float()
        hidden = model[1](model[0](x))
        wanted = model[3](hidden.masked_fill(largest(hidden, 0.5), 0.0))
        run = begun(model, MaxDropout(0.5), 6)
        assert torch.equal(model.train()(x), wanted)
        assert torch.equal(model.eval()(x), model[3](model[1](model[0](x))))
        run.finish()
        assert model[2].p == 0.9 and not model[2]._forward_hooks


def places_can_be_named() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8)), nn.Linear(8, 3), nn.ReLU())
    x = noise(5, 6).float()
    begun(model, MaxDropout(0.5, after=("0",)), 6)
    hidden = F.linear(x, model[0][0].weight, model[0][0].bias)  # type: ignore[index]
    dropped = hidden.masked_fill(largest(hidden, 0.5), 0.0)
    assert torch.equal(model.train()(x), model[2](model[1](dropped)))
    with pytest.raises(MethodError, match="'stage' matches none"):
        begun(nn.Sequential(nn.Linear(6, 3)), MaxDropout(after=("stage",)), 6)
    with pytest.raises(ModelError, match=r"name others, maxdropout\(after="):
        begun(nn.Sequential(nn.Linear(6, 3)), MaxDropout(), 6)


def the_share_is_noted_after_every_epoch() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).train()
    run, x = begun(model, MaxDropout(0.5), 6), noise(5, 6).float()
    shares: list[Any] = []
    for _ in range(3):
        shares.append(largest(model[0](x).relu(), 0.5).double().mean())
        model.eval()(x)
        model.train()(x).sum().backward()
        run.before_step()
        run.optimizer.step()  # type: ignore[union-attr]
        run.after_step()
    run.after_epoch()
    assert run.log[-1]["dropped"] == pytest.approx(float(sum(shares) / 3))
    assert run.state == {"dropped": 0, "units": 0}


CASES = [
    Case(
        "maxdropout",
        variants=("maxdropout(drop=0.6, mode='l2-random', scope='sample')",),
        refuses={name: "name others" for name in ("shared", "single")},
        own=(
            the_top_of_the_range_is_set_to_zero,
            the_ends_of_the_rate,
            scale_and_offset_change_nothing,
            gradients_are_those_of_a_masked_fill,
            the_share_that_is_dropped_is_not_the_rate,
            half_precision_is_compared_in_single,
            the_layer_is_nothing_in_evaluation,
            it_takes_the_place_of_dropouts,
            places_can_be_named,
            the_share_is_noted_after_every_epoch,
        ),
    )
]
