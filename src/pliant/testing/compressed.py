"""Checks of one compression: what came out of it, and what became of what went in."""

from __future__ import annotations

import copy
import json
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from pliant.cost import Example, LayerCost, cost, layer_costs, module_cost
from pliant.edits import replay
from pliant.errors import ModelError
from pliant.files import artifact
from pliant.nn.attention import SplitAttention
from pliant.result import Report
from pliant.testing.described import must
from pliant.testing.trial import Trial, outputs, put_in


def input_stays_untouched(found: Trial) -> None:
    """The network that came is as it was: tensors, flags, hooks."""
    now = found.dense.state_dict()
    must(list(now) == list(found.before), "the given model has other tensors than before")
    changed = [name for name in now if not torch.equal(now[name], found.before[name])]
    must(not changed, f"the given model changed in {', '.join(changed[:3])}")
    must(found.dense.training, "the given model was put into another mode")
    must(not put_in(found.dense), f"in the given model was left: {'; '.join(put_in(found.dense))}")


def only_plain_modules_left(found: Trial) -> None:
    """No hook or parametrization is in the result, and no class but standard ones and ops'."""
    left = put_in(found.result.model)
    must(not left, f"in the result was left: {'; '.join(left)}")
    own = {type(module) for module in found.dense.modules()}
    for name, module in found.result.model.named_modules():
        standard = type(module).__module__.startswith(("torch.nn.", "pliant.nn."))
        must(standard or type(module) in own, f"{name} is a {type(module).__name__}")


def outputs_are_finite(found: Trial) -> None:
    """In evaluation, for one sample, and in training."""
    model, inputs = copy.deepcopy(found.result.model), found.toy.inputs(4)
    for what, training, batch in (
        ("in evaluation", False, inputs),
        ("for one sample", False, found.toy.inputs(1)),
        ("in training", True, inputs),
    ):
        with torch.random.fork_rng(devices=[]):
            given = outputs(model.train(training), batch)
        must(given, f"there are no outputs {what}")
        must(all(torch.isfinite(o).all() for o in given), f"outputs are not finite {what}")


def costs_are_as_predicted(found: Trial) -> None:
    """Every edit costs what it predicted, measured on the dense network as soon as it runs again.

    It runs after every edit, but within a cut: all layers that the channels pass come first.
    """
    model, example = found.toy.model(), found.toy.inputs(1)
    rows = layer_costs(model, example)
    expected: dict[str, LayerCost] = {}
    for edit in found.result.edits:
        layer = edit.layer
        before = expected.get(layer) or rows.get(layer) or module_cost(model, example, layer)
        expected = {n: row for n, row in expected.items() if not _nested(n, layer)}
        expected[layer] = edit.predict(before)
        edit.apply(model, weights=False)
        try:
            rows = layer_costs(model, example)
        except ModelError:
            continue
        for layer, predicted in expected.items():
            own = isinstance(model.get_submodule(layer), SplitAttention)
            _compare(layer, predicted, rows, _between(model, example, layer) if own else 0)
        expected = {}
    must(not expected, f"after all edits the network fails: {', '.join(expected)} were changed")


def _nested(one: str, other: str) -> bool:
    """Say whether one of two different modules lies in the other: it has no prediction then."""
    return one != other and (f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}."))


def _between(model: nn.Module, example: Example, name: str) -> int:
    """Count the products of a module that none of its layers makes: queries with keys."""
    whole = module_cost(model, example, name)
    return whole.macs - sum(part.macs for _, part in whole.parts)


def _compare(
    layer: str, predicted: LayerCost, rows: Mapping[str, LayerCost], between: int = 0
) -> None:
    inside = (row for name, row in rows.items() if not layer or f"{name}.".startswith(f"{layer}."))
    parts = list(inside)
    for axis in ("params", "macs", "bytes"):
        wanted, measured = getattr(predicted, axis), sum(getattr(part, axis) for part in parts)
        measured += between if axis == "macs" else 0
        must(wanted == measured, f"{layer}: {axis} {wanted} predicted, {measured} found")


def budget_is_met(found: Trial) -> None:
    """The result, measured anew, stays within its budget, and the report says so."""
    dense, after = (cost(m, found.toy.inputs(1)) for m in (found.dense, found.result.model))
    for axis, bound in (found.budget.limits(dense) if found.budget else {}).items():
        now = getattr(after, axis)
        must(now <= bound, f"{axis} is {now:,} where {bound:,.0f} was allowed")
    must(found.result.report.met, "the report says that the budget was missed")


def report_is_complete(found: Trial) -> None:
    """Rows account for every parameter, each layer left alone has a reason, JSON holds it all."""
    report, after = found.result.report, cost(found.result.model, found.toy.inputs(1))
    must(report.after.params == after.params, "the report counts other parameters")
    for row in report.layers:
        same = row.before == row.after
        must(row.reason or row.form != "dense" or not same, f"{row.layer}: no reason to be dense")
    back = Report.from_json(report.to_json())
    must(back.layers == report.layers and back.method["name"], "the report is lost in JSON")
    model = found.result.model
    shared = len(dict(model.named_parameters(remove_duplicate=False))) > len([*model.parameters()])
    total = sum(row.after["params"] for row in report.layers)
    must(shared or total == after.params, f"rows sum to {total}, the model has {after.params}")


def saved_and_loaded_identical(found: Trial) -> None:
    """From the file and the dense architecture the same network comes, to the last bit."""
    result, toy, inputs = found.result, found.toy, found.toy.inputs(4)
    model = copy.deepcopy(result.model).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = result.save(Path(folder) / "toy.pliant")
        _check_plain(path)
        loaded = artifact.load(path, toy.model(seed=1)).eval()
    same_tensors(model, loaded, "loaded")
    pairs = zip(outputs(model, inputs), outputs(loaded, inputs), strict=True)
    must(all(torch.equal(a, b) for a, b in pairs), "the loaded network gives other outputs")
    fresh = toy.model()
    replay(fresh, result.edits, weights=False)
    must(str(fresh.eval()) == str(loaded), "edits replayed by hand build another architecture")
    must(str(model) == str(loaded), "the loaded network has another architecture")


OF_A_TRIAL = (
    input_stays_untouched,
    only_plain_modules_left,
    outputs_are_finite,
    costs_are_as_predicted,
    budget_is_met,
    report_is_complete,
    saved_and_loaded_identical,
)


def _check_plain(path: Path) -> None:
    """The file holds JSON and tensors, nothing that could run."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(archive.namelist())
        must(names == ["manifest.json", "weights.safetensors"], f"the file holds {names}")
        json.loads(archive.read("manifest.json"))


def saved(found: Trial) -> bytes:
    """Return the file of a result."""
    with tempfile.TemporaryDirectory() as folder:
        return found.result.save(Path(folder) / "toy.pliant").read_bytes()


def same_tensors(one: nn.Module, other: nn.Module, when: str) -> None:
    """Compare two networks to the last bit."""
    first, second = one.state_dict(), other.state_dict()
    must(list(first) == list(second), f"{when}, it has other tensors")
    wrong = [name for name in first if not torch.equal(first[name], second[name])]
    must(not wrong, f"{when}, these tensors differ: {', '.join(wrong[:4])}")
