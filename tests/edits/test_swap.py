"""Swap: layers of a closed table take the place of others, in trainings and in files."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pliant.cost import layer_costs
from pliant.edits import Swap, from_json, to_json
from pliant.errors import ArtifactError, EditError
from pliant.files import artifact
from pliant.nn.catalogue import SWAPS
from pliant.surgery.optim import carry
from tests.edits import held
from tests.edits.held import Whole


def net() -> Any:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, (3, 2), stride=(2, 1), padding=1, padding_mode="reflect"), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)),
    )


def signal() -> Any:
    return nn.Sequential(
        *(nn.Conv1d(2, 6, 5, dilation=2, padding="same"), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 4, bias=False)),
    )


def one(count: int) -> dict[str, int]:
    return {"multiplier": count}


WHOLES = (
    Whole("separable", net, (Swap("3", "separable", one(2)),), (3, 8, 8)),
    Whole("all", net, (Swap("0", "separable", one(1)), Swap("1", "identity")), (3, 8, 8)),
    Whole("signal", signal, (Swap("0", "separable", one(3)), Swap("4", "biased")), (2, 16)),
)
IDS = [whole.name for whole in WHOLES]


@pytest.mark.parametrize("check", held.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_a_swap_holds(whole: Whole, check: object) -> None:
    check(whole)  # type: ignore[operator]


@pytest.mark.parametrize("optimizer", held.OPTIMIZERS)
@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_a_training_goes_on_and_resumes(whole: Whole, optimizer: str) -> None:
    held.trains_on_and_resumes(whole, optimizer)


@pytest.mark.parametrize("whole", WHOLES, ids=IDS)
def test_files_hold(whole: Whole, tmp_path: Path) -> None:
    held.compresses_saves_and_loads(whole, tmp_path)


@pytest.mark.slow  # PyTorch takes a second to trace a network for ONNX
@pytest.mark.parametrize("whole", WHOLES[1:], ids=IDS[1:])
def test_exports_hold(whole: Whole, tmp_path: Path) -> None:
    held.exports_with_equal_outputs(whole, tmp_path)


# ---------------------------------------------------------------- the separable layer


def test_with_as_many_filters_as_taps_it_is_the_convolution() -> None:
    torch.manual_seed(0)
    for model, name, x in ((net(), "3", (2, 3, 9, 7)), (signal(), "0", (2, 2, 16))):
        inputs, layer = torch.randn(x), model.get_submodule(name)
        wanted = model.eval()(inputs)
        Swap(name, "separable", one(math.prod(layer.kernel_size))).apply(model)  # type: ignore[arg-type]
        assert torch.allclose(model(inputs), wanted, atol=1e-6)
        assert not isinstance(model.get_submodule(name), nn.Conv2d)


def test_with_fewer_filters_it_is_the_nearest_one() -> None:
    """By Eckart and Young, channel by channel: what is lost are the singular values left out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False).double())
    weight = model[0].weight.detach()
    lost = [torch.linalg.svdvals(weight[:, i].flatten(1))[2:].square().sum() for i in range(3)]
    Swap("0", "separable", one(2)).apply(model)
    depth, point = model[0].depth.weight.detach(), model[0].point.weight.detach()
    kernel = (point.reshape(8, 3, 2, 1, 1) * depth.reshape(1, 3, 2, 3, 3)).sum(2)
    assert torch.allclose((kernel - weight).square().sum(), torch.stack(lost).sum())


def test_a_bias_stays_the_parameter_it_was_with_its_momentum() -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.Adam(
        [{"params": model[0].parameters()}, {"params": model[1:].parameters(), "lr": 0.5}]
    )
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    bias, weight = model[3].bias, model[3].weight
    kept = optimizer.state[bias]
    carry(optimizer, Swap("3", "separable", one(1)).apply(model))
    assert model[3].point.bias is bias and optimizer.state[bias] is kept
    assert weight not in optimizer.state
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {
        id(p) for p in model[1:].parameters()
    }


def test_a_bias_that_comes_takes_nothing_from_its_weight() -> None:
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.Adam([{"params": [p], "lr": 0.1} for p in model.parameters()])
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    kept = optimizer.state[model[0].weight]
    carry(optimizer, Swap("0", "biased").apply(model))
    assert optimizer.state[model[0].weight] is kept and len(kept) == 3
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        *(id(model[0].weight), id(model[0].bias))
    ]


def test_new_parameters_join_none_but_an_optimizer_of_the_model() -> None:
    model = net()
    last = torch.optim.SGD(model[7].parameters(), 0.1)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    replaced = Swap("0", "biased").apply(model)
    carry(last, replaced)
    carry(other, replaced)
    assert [id(p) for p in last.param_groups[0]["params"]] == [
        *(id(model[7].weight), id(model[0].bias), id(model[7].bias))
    ]
    assert len(other.param_groups[0]["params"]) == 2


# ---------------------------------------------------------------- files


def test_files_of_version_one_still_say_the_same() -> None:
    old = [
        {"edit": "swap", "layer": "1", "form": "identity"},
        {"edit": "swap", "layer": "0", "form": "biased"},
    ]
    assert from_json(old) == [Swap("1", "identity"), Swap("0", "biased")]
    assert to_json(from_json(old)) == old


def test_settings_are_written_as_they_are() -> None:
    edit = Swap("3", "separable", {"multiplier": 2}, seed=5)
    row = {"edit": "swap", "layer": "3", "form": "separable", "spec": {"multiplier": 2}, "seed": 5}
    assert to_json([edit]) == [row] and from_json([row]) == [edit]
    assert edit != Swap("3", "separable", {"multiplier": 3}, seed=5)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (["multiplier"], "spec of the edit swap must be of type Spec"),
        ({"multiplier": {"a": 1}}, "spec of the edit"),
        ({"multiplier": None}, "spec of the edit"),
        ({"multiplier": [[1]]}, "spec of the edit"),
    ],
)
def test_only_plain_settings_are_read(spec: object, says: str) -> None:
    with pytest.raises(EditError, match=says):
        from_json([{"edit": "swap", "layer": "3", "form": "separable", "spec": spec}])


def test_a_file_with_settings_that_do_not_fit_is_refused(tmp_path: Path) -> None:
    for spec in ({"multiplier": 10**12}, {"multiplier": True}, {"multiply": 2}, {}):
        path = artifact.save(tmp_path / "a.pliant", net(), [Swap("3", "separable", spec)])
        with pytest.raises(ArtifactError, match="separable|takes 1 to 6 filters"):
            artifact.load(path, net())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (Swap("3", "os.system"), "Unknown form 'os.system' for 3: one of "),
        (Swap("3", "separable"), "separable for 3 takes multiplier, not none"),
        (Swap("3", "separable", {"multiplier": 1, "groups": 2}), "not groups, multiplier"),
        (Swap("3", "separable", {"multiplier": True}), "must be of type int, not 'True'"),
        (Swap("3", "separable", {"multiplier": 1.0}), "must be of type int, not '1.0'"),
        (Swap("3", "separable", {"multiplier": 7}), "^3 takes 1 to 6 filters for each channel"),
        (Swap("3", "separable", {"multiplier": 0}), "not 0"),
        (Swap("1", "separable", {"multiplier": 1}), "^1 must be a convolution without groups"),
        (Swap("0", "identity", {"multiplier": 1}), "identity for 0 takes no settings"),
        (Swap("0", "identity"), "^0 must be a batch norm to become an identity, not Conv2d"),
        (Swap("9", "biased"), "no layer '9'"),
    ],
)
def test_what_does_not_fit_is_refused(edit: Swap, says: str) -> None:
    model = net()
    before = [id(part) for part in model.modules()]
    with pytest.raises(EditError, match=says):
        edit.apply(model)
    assert [id(part) for part in model.modules()] == before


def test_single_grouped_and_parametrized_layers_are_refused() -> None:
    edit = Swap("0", "separable", one(1))
    with pytest.raises(EditError, match=r"wrap it in nn.Sequential"):
        replace(edit, layer="").apply(nn.Conv2d(3, 4, 3))
    with pytest.raises(EditError, match="without groups"):
        edit.apply(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))
    with pytest.raises(EditError, match="0 is parametrized"):
        edit.apply(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 4, 3))))


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), self.conv(x[..., ::2, ::2])


def test_every_call_and_every_byte_is_counted() -> None:
    model, x = Pyramid(), torch.randn(1, 4, 6, 6, dtype=torch.float64)
    predicted = Swap("conv", "separable", one(2)).predict(layer_costs(model, (x,))["conv"])
    assert predicted.params == 4 * 2 * (9 + 4) + 4
    assert predicted.bytes == 8 * predicted.params and predicted.macs == 4 * 2 * 13 * (36 + 9)


def test_every_kind_declares_its_contract() -> None:
    for kind in SWAPS.values():
        assert {*kind.spec.values()} <= {bool, int, float, str, tuple}
        assert kind.__doc__ and kind.build.__doc__ and kind.predict.__doc__
