"""Output sensitivity: ranks networks by generalization without a single label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from pliant.data import Data
from pliant.errors import DataError, ModelError
from pliant.families.analyze.noise import moved
from pliant.observe.watch import capture
from pliant.registry import In, Paper, register
from pliant.result import Finding

MOST_DRAWS = 1000
NULL = 1e-9  # of the outputs' own variance: a mean that moves less does not move at all


@register(
    "output_sensitivity",
    paper=Paper(
        "Generalization Comparison of Deep Neural Networks via Output Sensitivity",
        "M. Forouzesh, F. Salehi, P. Thiran",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2007.15378",
    ),
    verb="analyze",
)
@dataclass(frozen=True)
class OutputSensitivity:
    """Measures how much the mean of a network's logits moves under small noise on its inputs.

    The sensitivity S is the variance, over inputs, of the change of the mean logit when Gaussian
    noise is added after normalisation. No label is read. It follows the variance term of the test
    loss, so of networks trained to the same training loss the one with the lower S is expected to
    generalize better. S grows with the square of the logits' scale, of the noise and of the
    inputs: compare it only where these are equal. `pliant.api.probe.compare` lists several networks
    by S, each shown the same noise, with their losses beside; `bias_variance` of
    `pliant.families.analyze.variance` gives the variance term itself, from several trainings.

    *Measured* (bench ``sensitivity``, digits): over 16 kinds of MLP trained to the same loss, S has
    a rank correlation of 0.94 with the test loss and of 0.85 with the variance term. **It fails as
    a ranking of compressed candidates of one network**: the correlation with their accuracy is 0.00
    before fine-tuning and -0.78 after it, and 0.58 and -0.10 where S is divided by the mean square
    of the centred logits. How often a candidate decides as the dense network does, which needs no
    label either, has 0.97 and 0.97: rank candidates by that.

    The values are ``sensitivity`` (S), ``per_output`` (the mean over outputs of each one's own
    variance, which no cancellation hides) and ``noise`` (the change for each input and draw).
    Rows list the outputs. The test split is looked at, validation or training where there is none.

    >>> OutputSensitivity(noise=0.05).draws
    1
    """

    # sigma, standard deviation of what is added to normalised inputs
    noise: Annotated[float, In(0, open="low")] = 0.1
    draws: Annotated[int, In(1, MOST_DRAWS)] = 1  # of noise for each input

    def analyze(self, model: nn.Module, data: Data, generator: torch.Generator) -> Finding:
        """Compare outputs with and without noise, in eval mode and in the same batches."""
        with capture(model, (), lambda *_: None):  # eval mode, no gradients, flags put back
            changes = torch.cat(list(moved(model, data, self.noise, self.draws, generator)))
        samples, outputs = len(changes) // self.draws, changes.shape[1]
        if samples < 2:
            raise DataError("A variance over inputs needs at least 2 of them, but 1 came.")
        mean = changes.mean(1)
        each = changes.var(0, correction=0)
        sensitivity = float(mean.var(correction=0))
        if sensitivity <= NULL * float(each.mean()):
            raise ModelError(
                "The sum of the outputs must depend on the inputs, but it is always the same: give "
                "a network that ends in logits, without softmax or centring."
            )
        values = {"sensitivity": sensitivity, "per_output": float(each.mean()), "noise": mean}
        rows = tuple({"output": k, "variance": float(v)} for k, v in enumerate(each))
        text = (
            f"Noise of standard deviation {self.noise:g} on {samples:,} inputs moves "
            f"the mean of {outputs} outputs with variance {sensitivity:.4g}."
        )
        return Finding(values, rows, text)
