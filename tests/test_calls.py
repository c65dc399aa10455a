"""Networks that call their layers in ways of their own: by name, without gradients, with hooks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.errors import ModelError


class Own(nn.Module):
    """Two layers; its subclasses call them in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.h(self.b(self.a(x).relu()).relu())
        return out


class Unrecorded(Own):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Inferring(Own):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Keeping(Own):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        out: Tensor = self.h(self.b(self.last.relu()).relu())
        return out


class Worded(Own):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.h(input=self.b(input=self.a(input=x).relu()).relu())
        return out


def old_norm() -> nn.Module:
    torch.manual_seed(0)
    net = Own()
    net.b = nn.utils.weight_norm(net.b)
    net(torch.ones(2, 8))  # leaves a weight that gradients could flow through
    return net


READ = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
LOOKS = ("nrmf(samples=32)", "group_fisher", "groupwise_ptq(independent=1, joint=1)")


@pytest.mark.parametrize("method", LOOKS)
@pytest.mark.parametrize("make", [Unrecorded, Keeping, Worded])
def test_layers_called_in_ways_of_their_own_are_looked_at(method: str, make: Any) -> None:
    torch.manual_seed(0)
    one, net = Own(), make()
    net.load_state_dict(one.state_dict())
    wanted, found = (pliant.compress(n, READ, method, "bytes=0.9").model for n in (one, net))
    with torch.no_grad():
        assert torch.equal(found(READ), wanted(READ))


@pytest.mark.parametrize("method", LOOKS)
def test_inference_mode_is_refused_with_what_to_write(method: str) -> None:
    with pytest.raises(ModelError, match=r"use torch\.no_grad in forward instead"):
        pliant.compress(Inferring(), READ, method, "bytes=0.9")


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("method", ["nrmf(samples=32)", LOOKS[2]])
def test_a_weight_computed_by_an_old_hook_does_not_keep_a_network_from_being_copied(
    method: str, tmp_path: Path
) -> None:
    result = pliant.compress(old_norm(), READ, method, "bytes=0.95")
    result.save(tmp_path / "m.pliant")
    again = pliant.load(tmp_path / "m.pliant", old_norm())
    with torch.no_grad():
        assert torch.equal(again(READ), result.model(READ))


@pytest.mark.parametrize(
    "method", ["nrmf(samples=64)", "groupwise_ptq(bits=8, independent=1, joint=1)"]
)
def test_what_hooks_change_is_not_what_a_layer_reads_or_gives(method: str) -> None:
    """A hook that shifts inputs and outputs is calibrated around, not learned by the layer."""

    def make(hooked: bool) -> nn.Module:
        torch.manual_seed(0)
        net = Own()
        if hooked:
            net.b.register_forward_pre_hook(lambda m, args: (args[0] * 3 + 1,))
            net.b.register_forward_hook(lambda m, args, out: out - 2 * args[0])
        return net.eval()

    errors = []
    for hooked in (False, True):
        net = make(hooked)
        found = pliant.compress(net, READ, method, "bytes=0.9").model
        with torch.no_grad():
            errors.append(float((found(READ) - net(READ)).norm() / net(READ).norm()))
    assert errors[1] < 3 * errors[0]


def test_networks_that_cannot_be_looked_into_are_refused_in_a_sentence() -> None:
    script = torch.jit.script(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)))
    with pytest.raises(ModelError, match="ScriptModule.*before torch.jit.script"):
        pliant.compress(script, READ, "energy", "params=0.9")
    with pytest.raises(ModelError, match="ScriptModule"):
        pliant.cost(script, (READ,))
    with pytest.raises(ModelError, match=r"meta tensor.*model\.to_empty"):
        pliant.compress(Own().to("meta"), READ, "energy", "params=0.9")
