"""What low-rank methods share: choose layers, look at data, spend the budget, factorize."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from pliant.budget import Option
from pliant.cost import twin
from pliant.edits import Factor
from pliant.errors import nothing_for
from pliant.families.lowrank.options import forms_of, options, spared, with_kernels
from pliant.families.lowrank.refit import reconstruct as refit
from pliant.math.forms import FORMS, max_ranks
from pliant.math.metric import Metric, together
from pliant.nn.kinds import kernel
from pliant.nn.layers import Factorizable, heads_of
from pliant.observe.moments import metrics
from pliant.observe.spectra import row
from pliant.plan.allocate import cheapest
from pliant.plan.remember import remembered
from pliant.run import Run
from pliant.surgery.plain import plain
from pliant.surgery.select import factorizable

Layers = Mapping[str, Factorizable]
Form = Literal["auto", "tucker2", "input", "output", "spatial"]

BATCH = 128  # samples per calibration batch
HELD = 2**27  # numbers held at once: outputs of all layers that are looked at, or of one refitted


def subjects(
    run: Run, only: Sequence[str] = (), exclude: Sequence[str] = (), *, every: bool = False
) -> dict[str, Factorizable]:
    """Return the layers that a method may factorize, and record why the others may not be.

    Args:
        run: its network gets plain layers in the place of those that compute the same.
        only: name patterns of the layers to consider; none means all.
        exclude: name patterns of the layers to leave alone.
        every: whether transposed convolutions and tables are among them, whose kernels only
            `pliant.nn.kinds.kernel` reads right. Not where milliseconds are bounded: their forms
            are not in the table of a target.

    Raises:
        ModelError: there are none.
        MethodError: a name pattern matches no layer.
    """
    layers, reasons = run.factorizable(only, exclude, every=every and run.clock is None)
    run.keep_all(reasons)
    if not layers:
        needs = "it needs a convolution with groups=1, a Linear or an Embedding"
        raise nothing_for(f"layer to factorize: {needs}", reasons)
    return layers


def named(run: Run, names: Iterable[str]) -> Layers:
    """Return the layers of these names."""
    return {name: run.model.get_submodule(name) for name in names}  # type: ignore[misc]


def look(run: Run, layers: Layers, samples: int, *, seed: int = 0) -> dict[str, Metric]:
    """Return the metric of every layer from training inputs, without labels; none without data.

    Another seed looks at others of the inputs.
    """
    if not run.has_inputs or not samples:
        return {}

    def make() -> dict[str, Metric]:
        per = sum(math.prod(row.output) * row.calls for row in run.planner.rows().values())
        batch = max(1, min(BATCH, HELD // max(1, per)))  # gradients need all of these at once
        batches, loss = run.looks(samples, batch=batch, seed=seed)
        heads = {name: heads_of(run.model, name) for name in layers}
        every = {**layers, **named(run, (head for found in heads.values() for head in found))}
        found = metrics(run.model, every, batches, run.generator, loss)
        return {
            name: together(found[name], [found[head] for head in heads[name] if head in found])
            for name in layers
            if name in found
        }

    return remembered(run, ("metrics", *layers, samples, seed), make)


def check_reachable(
    run: Run,
    form: Form = "auto",
    *,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    every: bool = False,
) -> None:
    """Refuse a budget that not even factors of rank one would meet, before any work.

    Args:
        run: about to start.
        form: of the factors.
        only: name patterns of the layers to consider.
        exclude: name patterns of the layers to leave alone.
        every: as for `subjects`.

    Raises:
        BudgetError: the message names what is reachable.
        MethodError: a name pattern matches no layer.
    """
    if not run.limits():
        return
    if edits := plain(run.model, run.example):
        run = run.rehearsal()
        run.apply(*edits)
    costs, rows = run.planner.rows(), dict[str, list[Option]]()
    every = every and run.clock is None
    found, _ = factorizable(run.model, only=only, exclude=exclude, every=every)
    for layer, module in found.items():
        if not costs[layer].calls:  # left alone, and without inputs whose size would count
            continue
        shape, rows[layer] = kernel(module).shape, [Option(0.0, costs[layer])]
        for kind in forms_of(shape, FORMS if form == "auto" else (form,)):
            edit = Factor(layer, kind, (1,) * len(max_ranks(shape, kind)))
            rows[layer].append(Option(1.0, edit.predict(costs[layer]), edit))
    run.planner.check(rows)


def plan(
    run: Run,
    layers: Layers,
    form: Form,
    seen: Mapping[str, Metric],
    p: float,
) -> list[Factor]:
    """Plan ranks and forms for the run's budget, or without one for the energy ``p``.

    For a budget the sum of the damages is made least; without metrics one energy threshold holds
    for the whole network. For an energy every layer takes the cheapest form and ranks that keep
    it.

    Raises:
        BudgetError: the budget cannot be met.
    """
    if not run.limits():
        return cheapest(choices(run, layers, form, seen, level=1 - p), 1 - p)
    rows = choices(run, layers, form, seen)
    found = run.planner.allocate(rows, rule="sum" if seen else "max")
    return [edit for edit in found if isinstance(edit, Factor)]  # options hold no other edits


def choices(
    run: Run, layers: Layers, form: Form, seen: Mapping[str, Metric], level: float | None = None
) -> dict[str, list[Option]]:
    """Return what can be done with every layer: see `pliant.families.lowrank.options.options`.

    A score says how much an option loses. With metrics it is an estimate of how much the loss of
    the network rises, so scores of different layers can be added. With a ``level`` it is the share
    of the layer's own energy that is lost, and one of the options has exactly the ranks that this
    level asks for. A layer that no calibration input reached (an expert to which no sample was
    routed) counts as the others do on average.
    """
    timed = run.clock is not None and "latency" in run.limits()
    if timed:
        return _choices(run, layers, form, seen, level, timed=True)
    key = ("choices", *layers, form, level, *seen.items())
    return dict(remembered(run, key, lambda: _choices(run, layers, form, seen, level)))


def _choices(
    run: Run,
    layers: Layers,
    form: Form,
    seen: Mapping[str, Metric],
    level: float | None,
    *,
    timed: bool = False,
) -> dict[str, list[Option]]:
    costs = run.planner.rows()
    worth = {n: seen[n].energy(kernel(m).detach()) for n, m in layers.items() if n in seen}
    usual = sum(worth.values()) / max(1, len(worth))
    allowed = FORMS[:4] if form == "auto" else (form,)
    found, spare = {}, spared(seen)
    for name, module in layers.items():
        metric, steps = seen.get(name), {}
        spare(metric)
        if timed and run.clock is not None:
            steps = {
                kind: run.clock.table.step_for(module, kind)
                for kind in forms_of(kernel(module).shape, allowed)
            }
        rows = options(
            name,
            kernel(module),
            costs[name],
            allowed=allowed,
            metric=metric,
            steps=steps,
            level=level,
        )
        scale = worth.get(name, usual) if seen and level is None else 1.0
        found[name] = [replace(row, score=row.score * scale) for row in rows]
    return found


def factorize(
    run: Run,
    edits: Sequence[Factor],
    layers: Layers,
    seen: Mapping[str, Metric],
    *,
    recalibrate: bool = True,
    reconstruct: int = 0,
) -> None:
    """Apply planned edits with the best factors, and say which layers were left alone.

    Args:
        run: its model is changed.
        edits: a plan.
        layers: the layers that could have been factorized.
        seen: metrics to factorize in; empty for the weights' own.
        recalibrate: re-estimate batch norms afterwards, where there is data and anything changed.
        reconstruct: training inputs from which the new layers are then refitted, one after the
            other, to what the dense network says; 0 for none.
    """
    dense = twin(run.model) if run.has_inputs and reconstruct else None
    heads = {edit.layer: heads_of(run.model, edit.layer) for edit in edits}
    run.apply(
        *with_kernels(edits, layers, seen),
        *(
            replace(edit, layer=head, kernels=None, source=edit.layer)
            for edit in edits
            for head in heads[edit.layer]
        ),
    )
    changed = {edit.layer for edit in edits}
    for name in layers:
        if name not in changed:
            run.keep(name, "no factorized form at the rank it needs is smaller")
    if recalibrate and edits:
        run.recalibrate()
    if dense is not None:
        batch = max(1, min(reconstruct, HELD // _largest(run)))
        batches = run.inputs(reconstruct, batch=batch, seed=2)
        refit(dense, run.model, [name for name, tied in heads.items() if not tied], batches)


def _largest(run: Run) -> int:
    """Numbers in the largest output that a layer gives for one sample."""
    return max((math.prod(row.output) for row in run.planner.rows().values()), default=1) or 1


def note_spectra(run: Run, layers: Layers, p: float) -> None:
    """Write the singular values and energy ranks of all layers into the history."""
    run.note(**row(layers, p))
