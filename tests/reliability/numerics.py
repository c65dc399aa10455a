"""Odd numbers, networks, labels and options: a result that is finite and true, or one sentence.

A case is one registered method and one oddity: of the weights, the inputs, the labels, the
network, the budget, the training, or one option at the end of its range or beyond.
"""

from __future__ import annotations

import copy
import json
import math
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pliant
from pliant.api import analyze, cluster, compress, recover
from pliant.cost import cost
from pliant.data import Data, Train
from pliant.data.splits import Split
from pliant.errors import PliantError
from pliant.files import artifact
from pliant.registry import construct, get, plain
from pliant.registry.options import hints, ranges
from pliant.testing import described
from pliant.testing.case import Case
from pliant.testing.solved import PROBLEMS
from pliant.testing.trial import outputs
from tests.cases import CASES

LONGEST = 60  # seconds of one case
PLAN: dict[str, Any] = {"epochs": 1.0, "finetune": 0.5, "batch": 8, "lr": 0.01, "device": "cpu"}


class Untrue(AssertionError):
    """A result that says, or is, what it should not."""


class Hangs(BaseException):
    """A case took longer than anybody waits."""


# ---------------------------------------------------------------- what is odd


def _filled(value: float, share: float = 1.0) -> Callable[[nn.Module], nn.Module]:
    """Put a number in the place of all weights, or of the first entries of each."""

    def change(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for weight in model.parameters():
                count = max(1, round(share * weight.numel()))
                weight.view(-1)[:count] = value
        return model

    return change


def _scaled(factor: float) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(factor)
        return model

    return change


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def _statistics(value: float) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.fill_(value)
        return model

    return change


WEIGHTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a NaN": _filled(math.nan, 0.01),
    "an infinity": _filled(math.inf, 0.01),
    "zeros": _filled(0.0),
    "ones": _filled(1.0),
    "huge": _scaled(1e18),
    "largest": _filled(3e38),
    "tiny": _scaled(1e-20),
    "denormal": _scaled(1e-42),
    "half zeros": _filled(0.0, 0.5),
    "float16": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "float64": lambda model: model.double(),
    "frozen": _frozen,
    "variances of 0": _statistics(0.0),
    "variances of 1e30": _statistics(1e30),
    "variances below 0": _statistics(-1.0),
}


CONVS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
POOLS = {3: nn.AdaptiveAvgPool1d, 4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d}
WIDTHS = {"one layer": (4,), "one channel": (1, 1, 4), "one class": (6, 1)}
NETWORKS = ("no layers", "no weights", *WIDTHS, "only a head", "only a norm")


def _network(inputs: Tensor, kind: str) -> nn.Module:
    """A network of next to nothing for inputs of this shape."""
    flat, dims = inputs[0].numel(), inputs.dim()
    few: dict[str, Callable[[], list[nn.Module]]] = {
        "no layers": lambda: [],
        "no weights": lambda: [nn.ReLU(), nn.Flatten()],
        "only a head": lambda: [nn.Flatten(), nn.Linear(flat, 4)],
        "only a norm": lambda: [nn.Flatten(), nn.BatchNorm1d(flat)],
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind in few:
            return nn.Sequential(*few[kind]())
        widths, layers = (inputs.shape[1], *WIDTHS[kind]), []
        for into, out in pairwise(widths):
            one = CONVS[dims](into, out, 1) if dims in CONVS else nn.Linear(into, out)
            layers += [one, nn.ReLU()]
        end = [POOLS[dims](1), nn.Flatten()] if dims in CONVS else []
        return nn.Sequential(*layers[:-1], *end)


FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a NaN": lambda x: torch.where(x == x.min(), math.nan, x),
    "an infinity": lambda x: torch.where(x == x.max(), math.inf, x),
    "zeros": torch.zeros_like,
    "all alike": lambda x: x[:1].expand_as(x).clone(),
    "huge": lambda x: x * 1e30,
    "tiny": lambda x: x * 1e-42,
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bytes": lambda x: (x.clamp(-3, 3) * 40 + 128).to(torch.uint8),
    "whole numbers": lambda x: x.long(),
    "complex": lambda x: x.to(torch.complex64),
}  # fmt: skip
LABELS: dict[str, Callable[[Tensor], Any]] = {
    "floats": lambda y: y.float(),
    "halves": lambda y: y / 2,
    "int32": lambda y: y.int(),
    "bytes": lambda y: y.byte(),
    "booleans": lambda y: y > 1,
    "below zero": lambda y: y - 1,
    "above the classes": lambda y: y + 1000,
    "one class": torch.zeros_like,
    "ignored": lambda y: torch.full_like(y, -100),
    "NaN": lambda y: torch.full(y.shape, math.nan),
    "columns": lambda y: y[:, None],
    "fewer": lambda y: y[:-1],
    "none": lambda y: None,
}
COUNTS = (0, 1, 2, 9)  # samples; 9 leave a last batch of one
BUDGETS = (
    *("params=0", "params=1", "params=1.0", "params=1e-9", "params=-1", "params=nan"),
    *("macs=0", "macs=1e-6", "macs=1e30", "bytes=0", "bytes=0.01", "bytes=inf", "drop=0"),
)  # fmt: skip
TRAINS: dict[str, dict[str, Any]] = {
    "lr=1e10": {"lr": 1e10},
    "lr=1e-30": {"lr": 1e-30},
    "batch=1": {"batch": 1},
    "batch=1000": {"batch": 1000},
    "epochs=0.001": {"epochs": 0.001},
    "epochs=0": {"epochs": 0},
    "finetune only": {"epochs": 0, "finetune": 1},
    "clip=1e-30": {"clip": 1e-30},
    "weight_decay=1e6": {"weight_decay": 1e6},
    "bf16": {"precision": "bf16-mixed"},
    "distill": {"distill": 1.0},
    "adamw": {"optimizer": "adamw", "lr": 1.0},
}
BEYOND = (math.nan, math.inf, -math.inf, -1, 10**12, None, "x", True, (), [1], 0.5, -(10**400))


# ---------------------------------------------------------------- the cases


def names(method: str) -> list[str]:
    """Name all cases of a method."""
    verb = get(method).verb
    found = [f"option {key}={value!r}" for key, value in _options(method)]
    if verb in ("recover", "cluster"):
        return [*found, *(f"x {what}" for what in INPUTS), *(f"x of {n}" for n in COUNTS)]
    found += [f"weights {what}" for what in WEIGHTS]
    found += [f"network {what}" for what in NETWORKS]
    found += [f"inputs {what}" for what in INPUTS]
    found += [f"labels {what}" for what in LABELS]
    found += [f"samples {count}" for count in COUNTS]
    if verb == "compress":
        found += [f"budget {text}" for text in BUDGETS]
        found += [f"train {what}" for what in TRAINS]
    return found


def everything() -> list[tuple[str, str]]:
    """Name every method with every oddity, in one order."""
    return [(method, what) for method in sorted(CASES) for what in names(method)]


def _options(method: str) -> Iterator[tuple[str, Any]]:
    """Values at the ends of declared ranges, and beyond what is declared."""
    made = CASES[method].built()
    yield from described.odd_values(made)
    known = hints(type(made))
    for field in fields(made):
        if not field.init:
            continue
        for kind, declared in ranges(known[field.name]):
            for end, step in ((declared.low, -1), (declared.high, 1)):
                if math.isfinite(end):
                    yield field.name, kind(end) + step * (1 if kind is int else 1e-6)
        for value in BEYOND:
            yield field.name, value


def one(method: str, what: str, seed: int, folder: Path) -> None:
    """Run one case.

    Raises:
        PliantError: it was refused.
        Exception: anything else is a surprise.
    """
    choose = random.Random(f"{method} {what} {seed}")
    case, verb = CASES[method], get(method).verb
    kind, _, how = what.partition(" ")
    solver = _told(method, how, choose) if kind == "option" else case.built()
    if verb in ("recover", "cluster"):
        _solve(solver, case, how if kind == "x" else "", choose)
        return
    toys = [toy for toy in case.shown() if toy.name not in case.refuses]
    toy = toys[0] if choose.random() < 0.6 else choose.choice(toys)
    model, data = toy.model(), toy.data()
    if kind == "weights":
        model = WEIGHTS[how](model)
        if how in FLOATS:
            data = _changed(data, "inputs", FLOATS[how])
    elif kind == "network":
        model = _network(next(iter(data.batches("train", 4)))[0], how)
    elif kind in ("inputs", "labels", "samples"):
        data = _changed(data, kind, how)
    if verb == "analyze":
        found = analyze(model, data, solver)
        _must(_finite(found.values), "a value is not finite")
        return
    changes = PLAN | (TRAINS[how] if kind == "train" else {})
    train = Train(**changes) if kind == "train" or choose.random() < 0.6 else None
    budget, strict = how if kind == "budget" else case.bounds(), choose.random() < 0.5
    result = compress(model, data, solver, budget, train=train, strict=strict)
    _true(model, data, result, folder)


def _told(method: str, how: str, choose: random.Random) -> Any:
    """The method with one odd option, made as from text or by hand."""
    option, value = next(row for row in _options(method) if f"{row[0]}={row[1]!r}" == how)
    made = CASES[method].built()
    options = {**plain(made)["options"], option: value}
    return construct(method, options) if choose.random() < 0.5 else type(made)(**options)


def _changed(data: Data, kind: str, how: Any) -> Data:
    """The same data with other inputs, labels, or another number of samples."""
    splits: dict[str, Any] = {}
    parts: tuple[Split, ...] = ("train", "val")
    for split in filter(data.has, parts):
        inputs, labels = zip(*data.batches(split, 1000), strict=True)
        x, y = torch.cat(inputs), torch.cat(labels)
        if kind == "samples":
            x, y = x[: int(how)], y[: int(how)]
        elif kind == "labels":
            y = LABELS[how](y)
        else:
            x = x.to(how) if isinstance(how, torch.dtype) else INPUTS[how](x)
        splits[split] = x if y is None else (x, y)
    return Data(**splits)


def _solve(solver: Any, case: Case, how: str, choose: random.Random) -> None:
    """Recover or cluster, with an oddity of x."""
    verb = get(case.method).verb
    fit = [p for p in PROBLEMS.values() if p.verb == verb and p.name not in case.refuses]
    x, second = choose.choice(fit).make()
    few = int(how[3:]) if how.startswith("of ") else None
    if few is not None:
        second = second[:few] if isinstance(second, Tensor) else second
    change = INPUTS.get(how, lambda part: part[:few])
    x = [change(part) for part in x] if isinstance(x, list) else change(x)
    found = cluster(x, second, solver) if verb == "cluster" else recover(x, second, solver)
    _must(_finite(found.values), "a value is not finite")


# ---------------------------------------------------------------- what must hold


def _must(holds: Any, what: str) -> None:
    if not holds:
        raise Untrue(what)


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _true(dense: nn.Module, data: Data, result: Any, folder: Path) -> None:
    """See that a result is finite, costs what its report says, and is what its file holds."""
    for name, tensor in result.model.named_parameters():
        _must(torch.isfinite(tensor).all(), f"{name} is not finite")
    report = result.report
    for side in (report.before, report.after):
        _must(side.accuracy is None or 0 <= side.accuracy <= 1, f"accuracy is {side.accuracy}")
        _must(side.loss is None or math.isfinite(side.loss), f"loss is {side.loss}")
    json.dumps(json.loads(report.to_json()), allow_nan=False)
    example = data.example_for(dense)
    before, after = outputs(dense.eval(), example), outputs(result.model, example)
    if all(torch.isfinite(part).all() for part in before):
        _must(all(torch.isfinite(part).all() for part in after), "an output is not finite")
    counted = cost(result.model, example)
    _must(counted.params == report.after.params, "params are not those of the report")
    path = folder / "case.pliant"
    path.unlink(missing_ok=True)
    artifact.save(path, result.model, result.edits)
    again = outputs(pliant.load(path, copy.deepcopy(dense)), example)
    _must(
        all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(after, again, strict=True)),
        "the file gives other outputs",
    )


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    """End what takes longer, in the main thread."""

    def ring(number: int, frame: Any) -> None:
        raise Hangs(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def clear(error: PliantError) -> bool:
    """Whether a refusal is one sentence that a terminal may see."""
    said = str(error)
    return said.isprintable() and said.endswith((".", "?")) and 20 < len(said) < 1200


def run(
    cases: list[tuple[str, str]], folder: Path, seed: int = 0, *, progress: int = 0
) -> dict[str, Any]:
    """Run cases one after the other.

    Returns:
        How many gave a result that is finite and true, and were refused in a sentence; surprises:
        other exceptions, results that are not true, refusals that are no sentence; the slowest.
    """
    found: dict[str, Any] = {"true": 0, "refused": 0, "raw": 0, "untrue": 0, "slowest": 0.0}
    for number, (method, what) in enumerate(cases):
        began = time.process_time()
        ended, said = _ended(method, what, seed, folder)
        found[ended] += 1
        if said:
            print(f"{method} | {what} | {ended}: {said}", flush=True)
        found["slowest"] = max(found["slowest"], round(time.process_time() - began, 2))
        if progress and number % progress == progress - 1:
            print(number + 1, found, flush=True)
    return found


def _ended(method: str, what: str, seed: int, folder: Path) -> tuple[str, str]:
    """Run a case; say how it ended, and what is wrong with that."""
    try:
        with _within(LONGEST):
            one(method, what, seed, folder)
    except PliantError as error:
        return ("refused", "") if clear(error) else ("raw", f"no sentence: {str(error)[:300]!r}")
    except Untrue as error:
        return "untrue", str(error)
    except (Exception, Hangs) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "pliant" in f.filename]
        first = (str(error).strip().splitlines() or [""])[0]
        return "raw", f"{type(error).__name__}: {first[:200]} @ {' '.join(ours[-3:])}"
    return "true", ""


def drawn(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Draw cases at random, every method as often as the others."""
    choose = random.Random(seed)
    methods = sorted(CASES)
    rows: list[tuple[str, str]] = []
    while len(rows) < count:
        choose.shuffle(methods)
        for method in methods[: count - len(rows)]:
            kinds: dict[str, list[str]] = {}
            for what in names(method):
                kinds.setdefault(what.partition(" ")[0], []).append(what)
            rows.append((method, choose.choice(kinds[choose.choice(sorted(kinds))])))
    return rows
