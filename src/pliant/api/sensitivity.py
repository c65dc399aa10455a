"""What every layer is worth: each made smaller alone, at several sizes, and the network scored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from torch import nn

from pliant.api.verdict import judge
from pliant.cost import bare, count, twin
from pliant.data import Data
from pliant.data.ready import task_of
from pliant.data.splits import Split
from pliant.data.task import Task
from pliant.drivers.devices import own_randomness
from pliant.drivers.score import Score, device_of, evaluate
from pliant.errors import DataError, MethodError
from pliant.families.lowrank.factorize import choices, look, subjects
from pliant.families.lowrank.options import with_kernels
from pliant.families.prune.channels import removable, remove
from pliant.families.prune.fisher import group_fisher
from pliant.families.prune.scores import importance, weakest
from pliant.method import Method
from pliant.result import Finding
from pliant.run import Run, start
from pliant.surgery.prove import edits_of

Kind = Literal["rank", "width"]
Rows = list[dict[str, Any]]
Watch = Callable[[dict[str, Any]], None]

SHARES = (0.75, 0.5, 0.25, 0.1)
SAMPLES = 512  # training inputs that are looked at
BATCH = 128


def sensitivity(
    model: nn.Module,
    data: Any,
    kind: Kind = "rank",
    *,
    shares: Sequence[float] = SHARES,
    samples: int = SAMPLES,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    task: Task | str | None = None,
    seed: int = 0,
    watch: Watch = lambda row: None,
) -> Finding:
    """Make every layer smaller alone, at several sizes, and say what that costs the network.

    Nothing is trained. Factors and importance are those of training inputs, without labels, where
    there are any, and of the weights elsewhere.

    Args:
        model: any network; it stays as it is.
        data: as for `compress`, with labels to score: on the validation split, or on the test
            split where there is none.
        kind: ``rank`` factorizes each layer; ``width`` removes channels, of all layers at once
            that share them.
        shares: of a layer's parameters (``rank``) or channels (``width``) that stay.
        samples: training inputs to look at.
        only: name patterns of the layers to look at; none means all.
        exclude: name patterns of the layers to leave out.
        task: what is scored; told from outputs and labels if None.
        seed: of everything random; the caller's random state stays untouched.
        watch: told the layer that is looked at.

    Returns:
        A finding whose rows hold a ``layer``, the ``share`` that was asked for, what the layer
        ``became``, ``params`` and ``macs`` of the whole network then, its ``score`` and ``loss``,
        and what was ``lost`` (points, or percent of a metric that is no share). Its values are
        those of the dense network.

    Raises:
        DataError: nothing is labelled.
        MethodError: the kind is unknown, or a share is not between 0 and 1.
        ModelError: no layer can be made smaller.
    """
    if kind not in _TRIES:
        raise MethodError(f"A layer is made smaller by rank or by width, not by {kind!r}.")
    if not shares or not all(0 < share < 1 for share in shares):
        raise MethodError(f"Shares of a layer must be between 0 and 1, but {shares!r} came.")
    began, network = time.monotonic(), twin(bare(model)).eval()
    read = Data.of(data, seed=seed).read_by(network)
    split = _split(read)
    with own_randomness(seed, device_of(network)):
        known = task_of(task, None, None)
        dense = evaluate(network, read, split, task=known)
        run = start(network, Method(), data=read if read.has("train") else None,
                    example=read.example(), seed=seed, task=known)  # fmt: skip
        tries = _TRIES[kind](run, tuple(shares), samples, only, exclude)
        rows = [
            row | _scored(dense, evaluate(smaller, read, split, task=known))
            for row, smaller in _told(tries, watch)
        ]
    whole = run.planner.now()
    values = {
        dense.main: dense.value, "loss": dense.loss, "params": whole.params, "macs": whole.macs,
        "samples": read.size(split) or len(dense.rows),
    }  # fmt: skip
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    asked = {"name": f"sensitivity to {kind}", "options": {"shares": list(shares)}}
    took = round(time.monotonic() - began, 4)
    return Finding(values, tuple(rows), said(rows), seconds=took, seed=seed, method=asked)


def said(rows: Sequence[dict[str, Any]]) -> str:
    """Say which layers lose most and least at the smallest size of each."""
    if not rows:
        return "No layer can be made smaller at these shares."
    last: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["layer"] not in last or row["share"] < last[row["layer"]]["share"]:
            last[row["layer"]] = row
    order = sorted(last.values(), key=lambda row: row["lost"])
    least, most = order[0], order[-1]
    return (
        f"At its smallest size {most['layer']} loses most, {most['lost']:.1f}, "
        f"and {least['layer']} least, {least['lost']:.1f}."
    )


def _split(data: Data) -> Split:
    found: tuple[Split, ...] = ("val", "test")
    for split in found:
        if data.has(split):
            return split
    raise DataError(
        "What a layer is worth is scored on samples that do not train: give a validation or test "
        "split with labels."
    )


def _scored(dense: Score, score: Score) -> dict[str, Any]:
    verdict = judge(dense, score, 0.0)
    lost = math.inf if verdict.lost is None else verdict.lost
    return {"score": score.value, "loss": score.loss, "lost": lost}


def _told(tries: Iterator[tuple[dict[str, Any], nn.Module]], watch: Watch) -> Iterator[Any]:
    for row, model in tries:
        watch({"phase": f"{row['layer']} at {row['share']:.0%}"})
        yield row, model


Tries = Iterator[tuple[dict[str, Any], nn.Module]]


def _ranks(
    run: Run, shares: Sequence[float], samples: int, only: Sequence[str], exclude: Sequence[str]
) -> Tries:
    """Factorize one layer after the other in its best form, at each share of its parameters."""
    layers = subjects(run, only, exclude, every=True)
    seen, costs, whole = look(run, layers, samples), run.planner.rows(), run.planner.now()
    for name, options in choices(run, layers, "auto", seen).items():
        before = costs[name]
        for share in shares:
            fit = [o for o in options if o.edit and o.cost.params <= share * before.params]
            if not fit:
                continue
            best = min(fit, key=lambda option: option.score)
            again = run.rehearsal()
            again.apply(*with_kernels([best.edit], layers, seen))
            again.recalibrate(samples)
            ranks = ", ".join(map(str, best.edit.ranks))
            yield (
                {
                    "layer": name,
                    "share": share,
                    "became": f"{best.edit.form} {ranks}",
                    "params": whole.params - before.params + best.cost.params,
                    "macs": whole.macs - before.macs + best.cost.macs,
                },
                again.model,
            )


def _widths(
    run: Run, shares: Sequence[float], samples: int, only: Sequence[str], exclude: Sequence[str]
) -> Tries:
    """Remove the least important channels of one group after the other, at each share of them."""
    groups = removable(run, only, exclude)
    scores = {group.name: importance(run.model, group) for group in groups}
    if run.has_inputs:
        inputs, loss = run.looks(samples, batch=BATCH)
        scores = group_fisher(run.model, groups, inputs, run.generator, loss)
    for group in groups:
        units = len(group.units)
        for share in shares:
            kept = max(1, round(share * units))
            if kept == units:
                continue
            gone = weakest(scores[group.name], units - kept).tolist()
            again = run.rehearsal()
            edits = edits_of(again.model, groups, {group.name: gone})
            remove(again, edits)
            now = count(again.model, again.example)[0]
            yield (
                {
                    "layer": group.name,
                    "share": share,
                    "became": f"{kept} of {units} channels",
                    "params": now.params,
                    "macs": now.macs,
                },
                again.model,
            )


_TRIES: dict[str, Callable[..., Tries]] = {"rank": _ranks, "width": _widths}
