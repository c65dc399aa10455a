"""Layers under a norm of their weight are taken by every family, in both ways of PyTorch."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import pliant
from pliant.cost import layer_costs
from pliant.data import Train
from pliant.edits import replay
from pliant.surgery.plain import plain

Norm = Callable[[nn.Module], nn.Module]
INPUTS = torch.randn(16, 4, 16, generator=torch.Generator().manual_seed(0))


def old(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


NORMS: dict[str, Norm] = {
    "parametrization": parametrizations.weight_norm,
    "hook": old,
    "spectral": parametrizations.spectral_norm,
}
METHODS = {
    "energy(form='auto')": "params=0.7",
    "magnitude(ratio=0.25)": None,
    "groupwise_ptq(bits=8, independent=0, joint=0)": None,
    "hac": "bytes=0.7",
}


def vocoder(norm: Norm) -> nn.Module:
    """As networks that make sound from spectra are built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            norm(nn.Conv1d(4, 16, 3, padding=1)),
            nn.LeakyReLU(0.1),
            norm(nn.ConvTranspose1d(16, 16, 4, stride=2, padding=1, bias=False)),
            nn.LeakyReLU(0.1),
            norm(nn.Conv1d(16, 16, 3, padding=1)),
            nn.Flatten(),
            norm(nn.Linear(512, 8)),
        )


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_every_family_takes_them(method: str, norm: Norm, tmp_path: Path) -> None:
    dense = vocoder(norm)
    before = copy.deepcopy(dict(dense.state_dict()))
    result = pliant.compress(dense, [INPUTS], method, METHODS[method])
    assert result.report.after.bytes < 0.75 * result.report.before.bytes
    assert not [row for row in result.report.layers if "weight" in row.reason]
    result.save(tmp_path / "a.pliant")
    for given in (vocoder(norm), lambda: vocoder(norm)):
        back = pliant.load(tmp_path / "a.pliant", given).eval()
        assert torch.equal(back(INPUTS), result.model(INPUTS))
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_the_plain_layers_compute_the_same_and_train(norm: Norm) -> None:
    net: Any = vocoder(norm).eval()
    wanted, before, edits = net(INPUTS), layer_costs(net, (INPUTS,)), plain(net, (INPUTS,))
    assert [edit.layer for edit in edits] == ["0", "2", "4", "6"]
    replay(net, edits)
    assert torch.allclose(net(INPUTS), wanted, atol=1e-6)
    after = layer_costs(net, (INPUTS,))
    assert all(edit.predict(before[edit.layer]) == after[edit.layer] for edit in edits)
    assert [type(net[i]) for i in (0, 2, 6)] == [nn.Conv1d, nn.ConvTranspose1d, nn.Linear]
    assert all(parameter.requires_grad for parameter in net.parameters())
    labels = torch.arange(16) % 8
    train = Train(epochs=1, batch=8, device="cpu")
    result = pliant.compress(vocoder(norm), (INPUTS, labels), "energy", "params=0.7", train=train)
    assert result.report.after.params < 0.71 * result.report.before.params


def test_a_hook_of_ones_own_goes_on_being_called() -> None:
    net: Any = vocoder(old).eval()
    seen: list[int] = []
    handle = net[0].register_forward_pre_hook(lambda *_: seen.append(1))
    edits = plain(net, (INPUTS,))
    seen.clear()
    replay(net, edits)
    net(INPUTS)
    assert seen == [1]
    handle.remove()
    net(INPUTS)
    assert seen == [1]


def test_frozen_ones_stay_frozen() -> None:
    net: Any = vocoder(parametrizations.weight_norm)
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    replay(net, plain(net, (INPUTS,)))
    assert not net[0].weight.requires_grad and net[2].weight.requires_grad
