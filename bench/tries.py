"""Tries everything with one network of the architectures bench, in a process of its own."""

from __future__ import annotations

import copy
import importlib.util
import multiprocessing
import re
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import pliant
from bench.networks import Network, get
from pliant.data import Data
from pliant.edits import Factor, Plain, Prune, replay
from pliant.errors import BudgetError, MissingExtraError, PliantError
from pliant.families.prune.channels import FEWER
from pliant.files import artifact
from pliant.files.onnx import to_onnx
from pliant.math.forms import forms_for, max_ranks
from pliant.nn.kinds import kernel
from pliant.result import Result
from pliant.surgery.graph import trace
from pliant.surgery.plain import plain
from pliant.surgery.probe import OUTPUT
from pliant.surgery.prove import ignore

Values = dict[str, Any]
Tries = Mapping[str, Any]
COLUMNS = ("network", "ranks", "channels", "bits", "files", "onnx", "torch_pruning")
PRELOADED = ["torchvision", "timm", "transformers", "diffusers", "ultralytics.nn.tasks"]
PRELOADED += ["segmentation_models_pytorch", "torch_pruning", "bench.tries"]
MODULES = {"segmentation-models-pytorch": "segmentation_models_pytorch"}
RIVAL = 30  # seconds on the processor for Torch-Pruning, which may search for ever
LOST = 0.01  # least share of the parameters that removing channels must save


def apart(name: str, tries: Tries, seconds: float) -> Values:
    """Try everything in another process, which is ended when its time on the processor is up.

    Raises:
        MissingExtraError: the network's package is not installed.
    """
    package = get(name).package
    if importlib.util.find_spec(MODULES.get(package, package)) is None:
        raise MissingExtraError(f"{package} is not installed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(name, dict(tries), int(seconds), theirs), daemon=True
    )
    process.start()
    theirs.close()
    values: Values = {"wrong": []}
    began = COLUMNS[0]
    try:
        while True:
            column, found = ours.recv()
            if column == "began":
                began = found
            elif column == "wrong":
                values["wrong"].append(found)
            else:
                values[column] = found
    except EOFError:
        process.join()
    if "peak_mb" not in values:
        late = process.exitcode == -signal.SIGXCPU
        limit = RIVAL if began == "torch_pruning" else seconds
        why = f"not done after {limit:g} s" if late else "the process died"
        values[began] = {"why": why, "raw": True}
    return values


def _work(name: str, tries: Tries, seconds: int, answers: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    network = get(name)
    work = _Work(network, tries, answers)
    for column in COLUMNS:
        answers.send(("began", column))
        began = time.process_time()
        if column == "torch_pruning":
            until = min(seconds, int(began) + RIVAL)
            resource.setrlimit(resource.RLIMIT_CPU, (until, until + 5))
        found = _tried(getattr(work, column))
        answers.send((column, found | {"seconds": round(time.process_time() - began, 2)}))
        if column == "network" and "why" in found:
            break
    answers.send(("peak_mb", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))


def _tried(column: Callable[[], Values]) -> Values:
    """What a column found, or why it failed: whatever a network provokes is a finding."""
    try:
        return column()
    except PliantError as error:
        return {"why": _line(error)}
    except Exception as error:
        return {"why": f"{type(error).__name__}: {_line(error)}", "raw": True}


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:400] if lines else ""


def general(why: str) -> str:
    """Take the names of layers out of a reason."""
    return re.sub(r"\b[\w]+(\.[\w]+)+\b", "LAYER", why)


class _Work:
    """The columns of one network, in order; later ones use what earlier ones made."""

    def __init__(self, network: Network, tries: Tries, answers: Connection) -> None:
        self.of, self.tries, self.answers = network, tries, answers
        self.made: dict[str, Result] = {}

    def network(self) -> Values:
        self.dense = self.of.build()
        self.data = Data(train=[self.of.inputs(self.tries["samples"])], val=[self.of.inputs(4)])
        self.two = self.of.inputs(2)
        self.before = _outputs(self.dense, self.two)
        return {"params": _size(self.dense)}

    def ranks(self) -> Values:
        """Lower ranks to a share of the parameters, or to the next that can be reached."""
        for share in self.tries["shares"]:
            try:
                result = self._compress("ranks", f"params={share}")
            except BudgetError:
                if share == self.tries["shares"][-1]:
                    raise
                continue
            break
        self._equal_at_full_rank(result)
        report = result.report
        left = [row for row in report.layers if row.form == "dense"]
        return {
            "share": report.after.params / report.before.params,
            "works": report.after.params <= 0.9 * report.before.params,
            "error": _error(result),
            "layers": len(report.layers) - len(left),
            "left": dict(Counter(row.reason for row in left).most_common()),
        }

    def channels(self) -> Values:
        result = self._compress("channels", None)
        self._equal_without(result)
        share = _size(result.model) / _size(self.dense)
        left = [row for row in result.report.layers if row.form == "dense"]
        return {
            "share": share,
            "works": share <= 1 - LOST,
            "error": _error(result),
            "left": dict(Counter(general(row.reason) for row in left).most_common(12)),
        }

    def bits(self) -> Values:
        result = self._compress("bits", None)
        share = result.report.after.bytes / result.report.before.bytes
        error = _error(result)
        if error is not None and error > self.tries["most"]:
            self._wrong(f"int8 changes the outputs by {error:.0%}")
        left = [row for row in result.report.layers if row.form == "dense"]
        return {
            "share": share,
            "works": share <= 0.6,
            "error": error,
            "left": dict(Counter(row.reason for row in left).most_common(12)),
        }

    def torch_pruning(self) -> Values:
        """The same share of channels by Torch-Pruning, which spares the layers that answer."""
        pruning: Any = importlib.import_module("torch_pruning")
        model, spared = self.of.build(), self.answering()
        with torch.enable_grad():
            pruning.pruner.MagnitudePruner(
                model,
                self.two,
                importance=pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=self.tries["ratio"],
                ignored_layers=[m for n, m in model.named_modules() if n in spared],
            ).step()
        after = _outputs(model.eval(), self.two)
        if [a.shape for a in after] != [b.shape for b in self.before]:
            return {"why": "the outputs have other shapes than before"}
        share = _size(model) / _size(self.dense)
        return {"share": share, "works": share <= 1 - LOST}

    def answering(self) -> set[str]:
        """Name the layers whose channels are outputs of the network."""
        _, reasons = trace(self.dense, self.two)
        return {layer for layer, why in reasons.items() if OUTPUT in why}

    def files(self) -> Values:
        """Save and load every result, and compare outputs bit by bit."""
        for name, result in self.made.items():
            with tempfile.TemporaryDirectory() as folder:
                path = artifact.save(Path(folder) / "a.pliant", result.model, result.edits)
                again = artifact.load(path, self.of.build).eval()
            pairs = zip(*(_outputs(m, self.two) for m in (result.model, again)), strict=True)
            if not all(torch.equal(a, b) for a, b in pairs):
                self._wrong(f"the {name} come back otherwise from their file")
                return {"why": f"the {name} come back otherwise"}
        return {"equal": bool(self.made), "files": len(self.made)}

    def onnx(self) -> Values:
        if "ranks" not in self.made:
            return {"why": "its ranks could not be lowered"}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.onnx"
            model = self.made["ranks"].model
            made = to_onnx(model, path, self.two, tolerance=self.tries["onnx"])
        return {"difference": made.max_difference, "agrees": True}

    def _compress(self, name: str, budget: str | None) -> Result:
        result = pliant.compress(self.dense, self.data, self.tries[name], budget)
        self.made[name] = result
        after = _outputs(result.model, self.two)
        if [a.shape for a in after] != [b.shape for b in self.before]:
            self._wrong(f"{name}: the outputs have other shapes")
        elif _finite(self.before) and not _finite(after):
            self._wrong(f"{name}: the outputs are not finite")
        if _size(result.model) > result.report.after.params and name != "bits":
            self._wrong(f"{name}: the report counts fewer parameters than there are")
        return result

    def _equal_at_full_rank(self, result: Result) -> None:
        """Factorize the same layers at full ranks, the forms in turn, and compare outputs."""
        model = self._plain()
        for number, edit in enumerate(result.edits):
            if isinstance(edit, Plain):
                continue
            if isinstance(edit, Factor):
                shape = kernel(model.get_submodule(edit.layer)).shape
                forms = forms_for(shape)
                form = edit.form if edit.source else forms[number % len(forms)]
                edit = Factor(edit.layer, form, max_ranks(shape, form), source=edit.source)
            replay(model, [edit])
        change = _change(self.before, _outputs(model, self.two))
        if not change <= self.tries["equal"]:
            self._wrong(f"at full ranks the outputs change by {change:.1e} of the largest")

    def _equal_without(self, result: Result) -> None:
        """Compare the cut network with the whole one, which does not read what was cut.

        Not where norms take their statistics over fewer channels now, as the report says.
        """
        if any(row.reason == FEWER for row in result.report.layers):
            return
        cuts = [edit for edit in result.edits if isinstance(edit, Prune)]
        whole = self._plain()
        cut = copy.deepcopy(whole)
        ignore(whole, cuts)
        replay(cut, cuts)
        change = _change(_outputs(whole, self.two), _outputs(cut, self.two))
        if not change <= self.tries["equal"]:
            self._wrong(f"without its channels the outputs change by {change:.1e} of the largest")

    def _plain(self) -> nn.Module:
        """Copy the network, with plain layers in the place of those that compute the same."""
        model = copy.deepcopy(self.dense)
        replay(model, plain(model, self.two))
        return model

    def _wrong(self, what: str) -> None:
        self.answers.send(("wrong", what))


def _error(result: Result) -> float | None:
    return result.report.fidelity.error if result.report.fidelity else None


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    with torch.random.fork_rng([]), torch.inference_mode():
        torch.manual_seed(0)
        made = model(**copy.deepcopy(dict(inputs)))
    if isinstance(made, Mapping):  # keys and values for a next call are no answers
        made = {name: value for name, value in made.items() if name != "past_key_values"}
    return [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]


def _finite(outputs: list[Tensor]) -> bool:
    return all(bool(each.isfinite().all()) for each in outputs if each.is_floating_point())


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest change of any number, relative to the largest of its tensor."""
    pairs = [(b.double(), a.double()) for b, a in zip(before, after, strict=True) if b.numel()]
    if any(b.shape != a.shape for b, a in pairs):
        return float("inf")
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for b, a in pairs)
