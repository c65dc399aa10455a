"""GWQ-2KD: one scale per group of channels, then distillation on a few unlabelled samples."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pliant.budget import Option
from pliant.cost import Example, layer_costs
from pliant.data import unpack
from pliant.edits import Quantize, replay
from pliant.edits.quantize import LEAST, MOST
from pliant.errors import DataError, MethodError, ModelError
from pliant.families.quantize.tuning import (
    Outputs,
    Rates,
    Tunable,
    correct,
    independent,
    joint,
    tunable,
)
from pliant.math.quantize import Grouping
from pliant.method import Method
from pliant.nn.quantized import Values
from pliant.observe.ranges import begun, harm, observe, unread
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.blocks import blocks
from pliant.surgery.fold import foldable
from pliant.surgery.select import readable

CHOICES = (8, 4, 3, 2)  # bits among which a budget chooses
LONGEST = 100_000  # steps of one stage
HALF = (torch.float16, torch.bfloat16)


@register(
    "groupwise_ptq",
    paper=Paper(
        "GWQ-2KD: Towards Low-Bit Quantization of Deep Neural Networks with Limited Data",
        "Y. Yuan, C. Chen, X. Hu, S. Peng",
        "ICPR",
        2020,
        "https://doi.org/10.1109/ICPR48806.2021.9412678",
    ),
    saves="bytes",
)
@dataclass(frozen=True)
class GroupwisePTQ(Method):
    """Rounds weights and activations to a few bits, with one scale per group of channels.

    Batch norms are folded. Then a few training inputs, without labels, show the ranges of
    activations, and the rounded network learns to say what the dense one says: every block on
    its own first, then all of them together. It happens after the training, if there is one.
    With a budget every layer gets 8, 4, 3 or 2 bits, so that outputs of layers change least.

    *Departs from the paper*: its abstract names groups and stages, and no formula; quantizers
    and losses are the usual ones of block reconstruction. Scales are trained by their logarithms,
    all blocks of the first stage at the same time, and a block that got worse is taken back.
    Networks in 16 bits learn in 32.

    >>> GroupwisePTQ(bits=8, activations=8).groups
    4
    """

    # b_w, of a weight: 2 to 8; a budget chooses them by layer
    bits: Annotated[int, In(LEAST, MOST)] = 4
    # b_a, of what layers read: 2 to 8; 0 leaves it in floating point
    activations: Literal[0] | Annotated[int, In(LEAST, MOST)] = 4
    ends: Annotated[int, In(LEAST, MOST)] = 8  # bits of both in the first and the last layer
    # G, scales of a layer: 1 is per layer; 0 is one for every channel
    groups: Annotated[int, In(0)] = 4
    grouping: Grouping = "range"  # which channels share one
    samples: Annotated[int, In(1)] = 256  # N_cal, training inputs to look at
    # steps of stage 1, in which blocks learn by themselves
    independent: Annotated[int, In(0, LONGEST)] = 200
    joint: Annotated[int, In(0, LONGEST)] = 200  # steps of stage 2, in which they learn together
    batch: Annotated[int, In(1)] = 32  # samples of a step
    lr: Annotated[float, In(0, 1)] = 1e-4  # of weights in stage 1
    scale_lr: Annotated[float, In(0, 1)] = 3e-3  # of the logarithms of scales in stage 1
    # learning rates of stage 2, in units of those of stage 1
    slowdown: Annotated[float, In(0, 1)] = 0.3
    features: Annotated[float, In(0)] = 1.0  # mu, weight of each block's error in stage 2
    answers: Annotated[float, In(0)] = 1.0  # nu, weight of the divergence from the dense answer
    temperature: Annotated[float, In(0, open="low")] = 4.0  # T, softens answers
    outputs: Outputs = "classes"  # whether answers are compared by KL or by squared error
    correct: bool = True  # shift biases by the mean error before the stages
    integer: bool = False  # round sums' inputs too, to 8 bits, for runtimes of integers
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        """Refuse what cannot work; whether a budget can be met is tried on a copy."""
        self._check()
        if self.activations and not _has_data(run):
            raise MethodError(
                "groupwise_ptq needs inputs to find the ranges of activations, but there are "
                "none: pass data, or round weights only with activations=0."
            )
        folded = run.rehearsal()
        replay(folded.model, foldable(folded.model, run.example))
        choices = self._choices(folded)
        _spent(folded, choices, {name: [0.0] * len(row) for name, row in choices.items()})

    def finalize(self, run: Run) -> None:
        """Fold, choose bits, calibrate, distil, and pack."""
        run.apply(*foldable(run.model, run.example))
        look = self._look(run) if _has_data(run) else []
        choices = self._choices(run)
        batch = look[0] if look else None
        teacher = _wide(run.model).eval().requires_grad_(False)
        scores = harm(teacher, choices, self.grouping, batch) if run.limits() else {}
        plan = _spent(run, choices, scores)
        flows = observe(teacher, plan, look)
        values = {n: begun(teacher, e, self.grouping, flows.get(n)) for n, e in plan.items()}
        if look:
            values = self._distilled(run, teacher, plan, values, look)
        run.apply(*(replace(edit, values=values[name]) for name, edit in plan.items()))

    def _distilled(
        self,
        run: Run,
        teacher: Any,
        plan: Mapping[str, Quantize],
        values: Mapping[str, Values],
        look: Sequence[Example],
    ) -> dict[str, Values]:
        student = copy.deepcopy(teacher)
        tunable(student, {name: (edit.written, values[name]) for name, edit in plan.items()})
        if self.correct:
            correct(teacher, student, look)
        parts, batches = blocks(run.model, plan, run.example), self._stream(run)
        rates = Rates(self.lr, self.scale_lr)
        errors = independent(
            teacher, student, parts, batches, steps=self.independent, rates=rates, check=look
        )
        run.note(stage="independent", errors={name: list(pair) for name, pair in errors.items()})
        total = joint(
            teacher,
            student,
            parts,
            batches,
            steps=self.joint,
            rates=Rates(self.slowdown * self.lr, self.slowdown * self.scale_lr),
            features=self.features,
            answers=self.answers,
            temperature=self.temperature,
            outputs=self.outputs,
        )
        run.note(stage="joint", losses=[total[0], total[-1]] if total else [])
        found = {name: student.get_submodule(name) for name in plan}
        return {name: part.values() for name, part in found.items() if isinstance(part, Tunable)}

    def _choices(self, run: Run) -> dict[str, list[Quantize]]:
        """Ways to write each layer that make it smaller; record why others are left alone."""
        layers, reasons = readable(run.model, only=self.only, exclude=self.exclude)
        costs = layer_costs(run.model, run.example)
        order = list(observe(run.model, layers, [run.example]))
        reasons |= {name: "never called in a forward pass" for name in layers if name not in order}
        sums = set(unread(run.model, order, run.example)[:-1]) if self.integer else set()
        found: dict[str, list[Quantize]] = {}
        for name in order:
            bits = CHOICES if run.limits() else (self.bits,)
            end, channels = name in (order[0], order[-1]), len(layers[name].weight)
            edits = self._written(name, channels, (self.ends,) if end else bits, end=end)
            edits = [replace(edit, outputs=MOST if name in sums else 0) for edit in edits]
            if smaller := [e for e in edits if e.predict(costs[name]).bytes < costs[name].bytes]:
                found[name] = smaller
            else:
                reasons[name] = "packed it would take more bytes"
        for name, reason in reasons.items():
            run.keep(name, reason)
        if not found:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
            raise ModelError(
                "The model has no layer to quantize: it needs a Conv1d/2d/3d or a "
                f"Linear{f' ({why})' if why else ''}."
            )
        return found

    def _written(
        self, name: str, channels: int, choices: Sequence[int], *, end: bool
    ) -> list[Quantize]:
        groups = min(self.groups or channels, channels)
        indexed = self.grouping != "contiguous" and 1 < groups < channels
        inputs = self.activations and (self.ends if end else self.activations)
        return [Quantize(name, bits, groups, indexed, inputs) for bits in choices]

    def _look(self, run: Run) -> list[Example]:
        """One pass over the samples."""
        assert run.data is not None
        samples = min(self.samples, run.data.size("train") or self.samples)
        return list(itertools.islice(self._stream(run), math.ceil(samples / self.batch)))

    def _stream(self, run: Run) -> Iterator[Example]:
        return _stream(run, self.samples, self.batch)

    def _check(self) -> None:
        asked = [
            ("bits", LEAST <= self.bits <= MOST, "from 2 to 8"),
            ("ends", LEAST <= self.ends <= MOST, "from 2 to 8"),
            ("activations", self.activations in (0, *range(LEAST, MOST + 1)), "0, or from 2 to 8"),
            ("groups", self.groups >= 0, "0 or more"),
            ("samples", self.samples >= 1, "1 or more"),
            ("batch", self.batch >= 1, "1 or more"),
            ("independent", 0 <= self.independent <= LONGEST, f"from 0 to {LONGEST:,}"),
            ("joint", 0 <= self.joint <= LONGEST, f"from 0 to {LONGEST:,}"),
            ("lr", 0 <= self.lr <= 1, "from 0 to 1"),
            ("scale_lr", 0 <= self.scale_lr <= 1, "from 0 to 1"),
            ("slowdown", 0 <= self.slowdown <= 1, "from 0 to 1"),
            ("features", self.features >= 0, "0 or more"),
            ("answers", self.answers >= 0, "0 or more"),
            ("temperature", self.temperature > 0, "above 0"),
        ]
        for option, fits, wanted in asked:
            if not fits:
                raise MethodError(
                    f"groupwise_ptq: {option} must be {wanted}, not {getattr(self, option)}."
                )


def _has_data(run: Run) -> bool:
    return run.data is not None and run.data.has("train")


def _wide(model: nn.Module) -> nn.Module:
    """Copy a network; one of 16 bits becomes one of 32, since they are too few for small steps."""
    copied = copy.deepcopy(model)
    return copied.float() if _is_half(model) else copied


def _is_half(model: nn.Module) -> bool:
    return any(parameter.dtype in HALF for parameter in model.parameters())


def _stream(run: Run, samples: int, batch: int) -> Iterator[Example]:
    """Give inputs of a few samples without end, each time augmented anew, for `_wide`."""
    device, half = next(run.model.parameters()).device, _is_half(run.model)
    assert run.data is not None
    try:
        few = run.data.subset(train=samples, seed=run.seed)
    except DataError:  # a loader: what it gives first, again and again
        again = run.data.calibration(samples, batch=batch, seed=run.seed)
        yield from (_moved(example, device, half=half) for example in itertools.cycle(again))
        return
    for epoch in itertools.count():
        passes = few.batches("train", batch, seed=run.seed, epoch=epoch, augment=True, shuffle=True)
        yield from (_moved(unpack(item)[0], device, half=half) for item in passes)


def _moved(example: Any, device: torch.device, *, half: bool) -> Any:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, torch.float32 if half and value.dtype in HALF else value.dtype)

    return tree_map(move, example)


def _spent(
    run: Run, choices: Mapping[str, Sequence[Quantize]], scores: Mapping[str, Sequence[float]]
) -> dict[str, Quantize]:
    """Take the only choice of each layer, or spend the budget where it does least harm."""
    if not run.limits():
        return {name: edits[0] for name, edits in choices.items()}
    costs = layer_costs(run.model, run.example)
    options = {
        name: [
            Option(score, edit.predict(costs[name]), edit)
            for score, edit in zip(scores[name], edits, strict=True)
        ]
        for name, edits in choices.items()
    }
    return {edit.layer: edit for edit in run.planner.allocate(options, rule="sum")}  # type: ignore[misc]
