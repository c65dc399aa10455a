"""Layers that leave a search early: factorized as soon as it costs them next to nothing."""

from __future__ import annotations

from collections.abc import Mapping

from pliant.edits import Factor
from pliant.families.lowrank.factorize import Form, Layers, factorize, look, plan
from pliant.families.lowrank.losses import losses
from pliant.math.metric import Metric
from pliant.nn.kinds import kernel
from pliant.run import Run


def factorize_ready(run: Run, layers: Layers, form: Form, samples: int, p: float) -> list[str]:
    """Factorize the layers that lose next to nothing at the ranks they are to have.

    The weights alone say cheaply whether there may be any; then the data's plan decides.

    Args:
        run: its model is changed.
        layers: what is still dense and searched.
        form: of the factors.
        samples: training inputs to look at.
        p: share of a layer's energy that its planned ranks have to hold.

    Returns:
        the names of the layers that left.
    """
    if not layers or not _ready(run, layers, form, {}, p):
        return []
    seen = look(run, layers, samples)
    edits = _ready(run, layers, form, seen, p)
    names = [edit.layer for edit in edits]
    if names:
        factorize(run, edits, {name: layers[name] for name in names}, seen, recalibrate=False)
        run.note(factorized=names)
    return names


def _ready(
    run: Run, layers: Layers, form: Form, seen: Mapping[str, Metric], p: float
) -> list[Factor]:
    """The edits of the plan that keep the share p of their layer's energy."""

    def lost(edit: Factor) -> float:
        found = losses(kernel(layers[edit.layer]), (edit.form,))[edit.form]
        return found.at([edit.ranks])[0]

    return [edit for edit in plan(run, layers, form, seen, p) if lost(edit) <= 1 - p]
