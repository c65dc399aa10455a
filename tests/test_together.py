"""Training methods in one loop: every pair in every order has both effects, or is refused."""

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.compose import chain, together
from pliant.data import Data, Train
from pliant.drivers.loop import fit
from pliant.errors import ChainError
from pliant.method import Method
from pliant.methods.distill.kd import KD
from pliant.methods.distill.oskd import OSKD
from pliant.methods.distill.ssal import SSAL
from pliant.methods.layers.dmnn import DMNN
from pliant.methods.train.maxdropout import MaxDropout
from pliant.methods.train.mltp import MLTP
from pliant.methods.train.norm_loss import NormLoss
from pliant.methods.train.orthogonal_loss import OrthogonalLoss
from pliant.methods.train.p_diff import PDiff
from pliant.methods.train.progressive_stepwise import ProgressiveStepwise
from pliant.run import Run, start
from pliant.zoo.staged import StagedResNet

TRAIN = Train(epochs=2, batch=8, lr=0.05, schedule="constant", warmup=0, device="cpu")
METHODS: dict[str, Method] = {
    "norm_loss": NormLoss(0.1),
    "maxdropout": MaxDropout(0.5),
    "mltp": MLTP(alpha=0.1),
    "orthogonal_loss": OrthogonalLoss(),
    "p_diff": PDiff(0.4, window=2, ramp=0),
    "progressive_stepwise": ProgressiveStepwise((0.5, 1.0)),
}
REFUSED = {
    frozenset(("p_diff", "mltp")): "p_diff weighs .* mltp trains on batches of its own too",
    frozenset(("p_diff", "orthogonal_loss")): "p_diff weighs .* orthogonal_loss replaces it",
    frozenset(("mltp", "orthogonal_loss")): "orthogonal_loss replaces the loss, and mltp would go",
}
_DONE: dict[tuple[str, ...], Tensor] = {}


def net() -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*conv, nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 3))


def samples(side: int = 6) -> Data:
    random = torch.Generator().manual_seed(1)
    images = torch.randn(32, 1, side, side, generator=random)
    return Data((images, torch.randint(0, 3, (32,), generator=random)))


def trained(method: Method, build: Callable[[], nn.Module] = net, side: int = 6) -> Run:
    data = samples(side)
    run = start(build(), method, data=data, epochs=2, batch=8)
    fit(run, data, TRAIN)
    return run


def weights(*names: str) -> Tensor:
    """The first layer after a training by these methods together."""
    if names not in _DONE:
        found: Any = trained(together(*(METHODS[name] for name in names))).model
        _DONE[names] = found[0].weight.detach().clone()
    return _DONE[names]


@pytest.mark.parametrize("pair", list(permutations(METHODS, 2)), ids=" and ".join)
def test_both_act_whatever_the_order(pair: tuple[str, str]) -> None:
    if words := REFUSED.get(frozenset(pair)):
        with pytest.raises(ChainError, match=words):
            trained(together(*(METHODS[name] for name in pair)))
        return
    found = weights(*pair)
    assert torch.equal(found, weights(*reversed(pair)))
    for name in pair:
        assert not torch.allclose(found, weights(name), atol=1e-6), name


def test_a_loss_is_replaced_before_anything_is_added_to_it() -> None:
    both = trained(together(OrthogonalLoss(), KD()))
    assert both.finished or both.step == 8
    with pytest.raises(ChainError, match="what kd adds to it would be lost: name orthogonal_loss"):
        trained(together(KD(), OrthogonalLoss()))
    with pytest.raises(ChainError, match="would be lost"):
        trained(together(chain(KD(), NormLoss()), OrthogonalLoss()))
    with pytest.raises(ChainError, match="would go on with another one"):
        trained(together(OrthogonalLoss(), OrthogonalLoss("energy")))
    trained(chain(KD(), OrthogonalLoss()))


def test_distillation_of_the_loop_is_added_to_what_replaces_the_loss() -> None:
    """It teaches the scores, so it moves the layer below the head beyond what one step would."""
    data, found = samples(), []
    for share in (0.0, 0.5):
        run = start(net(), OrthogonalLoss(), data=data, steps=4)
        train = Train(epochs=1, batch=8, lr=0.05, distill=share, device="cpu")
        fit(run, data, train, teacher=net().eval())
        found.append(run.model[0].weight.detach().clone())  # type: ignore[index]
    assert not torch.allclose(*found, atol=1e-6)


def staged() -> nn.Module:
    torch.manual_seed(0)
    return StagedResNet((2,), (8,), classes=3, inputs=1)


@pytest.mark.parametrize("other", [OSKD(), SSAL(), DMNN()], ids=lambda m: type(m).__name__)
def test_a_second_batch_is_not_taken_for_the_loops_own(other: Method) -> None:
    """What a method watches of the network is of the first batch, called before or after."""
    found = []
    for parts in ((MLTP(0.0, 0.1), other), (other, MLTP(0.0, 0.1)), (other,)):
        run = trained(together(*parts), staged, 8)
        found.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    if not isinstance(other, DMNN):  # whose gates draw once more for the second batch
        assert torch.allclose(found[0], found[2], atol=1e-5)
