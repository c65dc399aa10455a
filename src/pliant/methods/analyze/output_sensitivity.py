"""Output sensitivity: ranks networks by generalization without a single label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from pliant.cost import Example, call
from pliant.data import Data, unpack
from pliant.data.splits import Split
from pliant.errors import DataError, ModelError
from pliant.observe.watch import capture
from pliant.registry import In, Paper, register
from pliant.result import Finding

BATCH, MOST_DRAWS = 256, 1000
SUMS_TO_ONE = 1e-4  # how far sums of probabilities may be from 1
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
    inputs: compare it only where these are equal.

    The values are ``sensitivity`` (S), ``per_output`` (the mean over outputs of each one's own
    variance, which no cancellation hides) and ``noise`` (the change for each input). Rows list the
    outputs. The test split is looked at, validation or training where there is none.

    >>> OutputSensitivity(noise=0.05).draws
    1
    """

    # sigma, standard deviation of what is added to normalised inputs
    noise: Annotated[float, In(0, open="low")] = 0.1
    draws: Annotated[int, In(1, MOST_DRAWS)] = 1  # of noise for each input

    def analyze(self, model: nn.Module, data: Data, generator: torch.Generator) -> Finding:
        """Compare outputs with and without noise, in eval mode and in the same batches."""
        with capture(model, (), lambda *_: None):  # eval mode, no gradients, flags put back
            changes = torch.cat(list(self._changes(model, data, generator)))
        samples, outputs = changes.shape
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
            f"Noise of standard deviation {self.noise:g} on {samples // self.draws:,} inputs moves "
            f"the mean of {outputs} outputs with variance {sensitivity:.4g}."
        )
        return Finding(values, rows, text)

    def _changes(
        self, model: nn.Module, data: Data, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Yield the changes of all outputs (inputs of a batch, outputs), in float64."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for batch in data.batches(_split(data), BATCH):
            inputs = _over(unpack(batch)[0], lambda x: x.to(device))
            clean = _logits(model, inputs)
            _check(clean)
            for _ in range(self.draws):
                moved = _logits(model, _over(inputs, lambda x: self._moved(x, generator)))
                yield (moved - clean).double()

    def _moved(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        if not inputs.is_floating_point():
            raise DataError(
                f"Noise needs inputs of real numbers, but {inputs.dtype} came: convert and "
                "normalise them as in training."
            )
        drawn = torch.randn(inputs.shape, generator=generator, dtype=torch.float32)
        return inputs + self.noise * drawn.to(inputs)


def _split(data: Data) -> Split:
    splits: tuple[Split, ...] = ("test", "val", "train")
    for split in splits:
        if data.has(split):
            return split
    raise DataError("A network is looked at on inputs, but the data have none: give some.")


def _over(inputs: Example, change: Any) -> Example:
    """Change every tensor of a forward call's inputs."""
    if isinstance(inputs, Mapping):
        return {k: change(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return tuple(change(value) if isinstance(value, Tensor) else value for value in inputs)


def _logits(model: nn.Module, inputs: Example) -> Tensor:
    try:
        found: Any = call(model, inputs)
    except Exception as error:  # a model may fail in any way
        raise ModelError(
            f"The model fails in forward on these inputs ({type(error).__name__}: {error}); check "
            "that model and data fit."
        ) from error
    named = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", found)
    if not isinstance(named, Tensor) or named.dim() != 2:
        raise ModelError(
            "The model must give a row of logits for each input, a tensor (inputs, classes) or "
            f"something with logits, not {type(found).__name__}."
        )
    return named


def _check(logits: Tensor) -> None:
    if logits.shape[1] < 2:
        raise ModelError("The model must give at least 2 outputs for each input, but gives 1.")
    if logits.dtype in (torch.float16, torch.bfloat16):
        raise ModelError(
            f"Small differences drown in {logits.dtype}: convert the model with model.float()."
        )
    if not torch.isfinite(logits).all():
        raise ModelError("The model's outputs must be finite, but some are NaN or infinity.")
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < SUMS_TO_ONE).all():
        raise ModelError(
            "The model gives probabilities, whose sum no noise can move: take its outputs before "
            "the softmax."
        )
