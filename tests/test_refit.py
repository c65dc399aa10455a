"""Refitting walks each network once, and each layer makes up for those before it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pliant.edits import Factor, replay
from pliant.errors import ModelError
from pliant.families.lowrank.refit import reconstruct
from pliant.observe.watch import Stepped


def network(depth: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth))).eval()


def factorized(dense: nn.Module, rank: int = 4) -> tuple[nn.Module, list[str]]:
    model, names = copy.deepcopy(dense), [f"{i}.0" for i in range(4)]
    replay(model, [Factor(name, "svd", (rank,)) for name in names])
    return model, names


def error(dense: nn.Module, model: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((dense(inputs) - model(inputs)).square().mean())


def test_each_layer_is_the_regression_on_what_the_layers_before_it_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pliant.families.lowrank.refit.RIDGE", 1e-9)
    dense = network()
    model, names = factorized(dense)
    inputs = torch.randn(400, 8)
    before = error(dense, model, inputs)
    reconstruct(dense, model, names, [(inputs,)])
    assert error(dense, model, inputs) < before
    with torch.no_grad():  # the last layer: least squares
        given = model[:3](inputs)  # type: ignore[index]
        read = torch.cat([model[3][0][0](given), torch.ones(400, 1)], 1)  # type: ignore[index]
        wanted = dense[3][0](dense[:3](inputs))
        best = torch.linalg.lstsq(read, wanted).solution
        last = model[3][0][1]  # type: ignore[index]
    assert torch.allclose(last.weight.T, best[:-1], atol=0.01)
    assert torch.allclose(last.bias, best[-1], atol=0.01)


def test_the_passes_do_not_grow_with_the_layers() -> None:
    dense = network()
    model, names = factorized(dense)
    passes = {"dense": 0, "small": 0}
    for key, net in (("dense", dense), ("small", model)):
        net.register_forward_pre_hook(lambda *_, key=key: passes.__setitem__(key, passes[key] + 1))
    reconstruct(dense, model, names, [(torch.randn(50, 8),), (torch.randn(50, 8),)])
    assert passes == {"dense": 2, "small": 2}


def test_several_batches_are_summed() -> None:
    dense = network(depth=4)
    inputs = torch.randn(400, 8)
    (one, names), (two, _) = factorized(dense), factorized(dense)
    reconstruct(dense, one, names, [(inputs,)])
    reconstruct(dense, two, names, [(part,) for part in inputs.chunk(4)])
    apart = (one[0][0][1].weight - two[0][0][1].weight).detach().abs().max()  # type: ignore[index]
    assert float(apart) < 0.02  # the first layer reads the same in both


def test_an_error_of_the_dense_network_arrives_and_leaves_no_hook() -> None:
    dense = network()
    model, names = factorized(dense)
    handle = dense[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(ModelError, match="OSError: no"):
        reconstruct(dense, model, names, [(torch.randn(5, 8),)])
    handle.remove()
    for net in (dense, model):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_walk_that_is_left_ends() -> None:
    dense = network()
    with Stepped(dense, ["0.0", "3.0"], (torch.randn(2, 8),)) as walk:
        assert walk.until("0.0") is not None
    assert not walk._thread.is_alive()
    with Stepped(dense, ["0.0", "3.0"], (torch.randn(2, 8),)) as walk:
        assert walk.until("3.0") is not None and walk.until("0.0") is not None
        assert walk.until("0.0") is None


def test_layers_called_twice_learn_from_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())

    torch.manual_seed(1)
    dense = Twice().eval()
    model = copy.deepcopy(dense)
    replay(model, [Factor("layer", "svd", (3,))])
    inputs = torch.randn(300, 6)
    before = error(dense, model, inputs)
    reconstruct(dense, model, ["layer"], [(inputs,)])
    assert error(dense, model, inputs) < before
