"""What kernels would become if their network were factorized now."""

from __future__ import annotations

from torch import Tensor

from pliant.families.lowrank.factorize import Form, Layers, look, plan
from pliant.families.lowrank.options import with_kernels
from pliant.math import forms
from pliant.nn.kinds import kernel
from pliant.run import Run


def goals(run: Run, layers: Layers, form: Form, samples: int, p: float) -> dict[str, Tensor]:
    """Plan the whole network for its budget, and return the product of each layer's factors.

    A layer that the plan leaves dense has no goal.

    Args:
        run: without a budget ranks keep the energy ``p``.
        layers: what may be factorized.
        form: of the factors.
        samples: training inputs to look at; 0 looks at weights only.
        p: energy kept.
    """
    seen, found = look(run, layers, samples, seed=run.step), dict[str, Tensor]()
    for edit in with_kernels(plan(run, layers, form, seen, p), layers, seen):
        weight = kernel(layers[edit.layer]).detach()
        factors = edit.kernels or forms.decompose(weight, edit.form, edit.ranks)
        whole = forms.compose(list(factors), edit.form)
        found[edit.layer] = whole.reshape(weight.shape).to(weight.dtype)
    return found
