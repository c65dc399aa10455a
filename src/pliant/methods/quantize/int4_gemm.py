"""U4 GEMM: convolutions as exact products of 4-bit codes, summed in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from torch import Tensor

from pliant.edits import Edit, Multiply
from pliant.edits.quantize import LEAST, MOST
from pliant.errors import MethodError
from pliant.families.quantize.layers import Layers, packable
from pliant.families.quantize.levels import damages
from pliant.families.quantize.plan import smaller, spent
from pliant.families.quantize.simulate import Follow, Simulated, extents, weight_codes
from pliant.math.gemm import codes
from pliant.method import Method
from pliant.nn import kinds
from pliant.nn.product import KINDS
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.fold import foldable

CHOICES = (8, 4)  # bits among which a budget chooses
BATCH = 64  # samples of a batch of calibration
UNREACHED = "no calibration input is routed to it, so what it reads has no range"


@register(
    "int4_gemm",
    paper=Paper(
        "Fast Implementation of 4-bit Convolutional Neural Networks for Mobile Devices",
        "A. Trusov, E. Limonova, D. Slugin, D. Nikolaev, V. V. Arlazarov",
        "ICPR",
        2020,
        "https://arxiv.org/abs/2009.06488",
    ),
    saves="bytes",
)
@dataclass(frozen=True)
class Int4Gemm(Method):
    """Trains with weights and activations rounded to 4 bits, then multiplies them as codes.

    Batch norms are folded, the ranges of activations are calibrated, and from then on layers
    round what they read and their weights, straight through, while the network trains: start
    from a trained one, with a tenth of its last learning rate. In the end convolutions and linear
    layers hold codes, two in a byte, and compute exact products of whole numbers: sums of 290
    products fit into 16 bits, sums of these into 32. Without training the ranges alone decide,
    which costs accuracy. With a budget layers between the first and the last get 8 or 4 bits.

    Loops compiled by numba (``pip install "pliant[code]"``) and plain PyTorch give the same
    integers; neither is faster than PyTorch's floating point on a CPU with wide vectors.

    *Departs from the paper*: its abstract names no formula; the scheme is that of gemmlowp, and
    panels have 64 rows for registers of 512 bits. The whole network is rounded from the first
    step, not layer by layer. Biases stay in floating point, added after the scales; what the
    codes of zero bring in is folded into whole numbers. Grouped convolutions whose panels would
    take more bytes than they save stay as they are.

    >>> Int4Gemm(bits=5).ends
    8
    """

    # p, of a code of weights and activations; a budget chooses 8 or 4
    bits: Annotated[int, In(LEAST, MOST)] = 4
    # bits in the first and the last layer; 0 leaves these in floating point
    ends: Literal[0] | Annotated[int, In(LEAST, MOST)] = 8
    scales: Literal["layer", "channel"] = "layer"  # s_b, for the whole weight, or each channel
    samples: Annotated[int, In(1)] = 512  # training inputs to calibrate on
    # share of the range so far when a batch moves it
    momentum: Annotated[float, In(0, 0.999)] = 0.9
    # share of what a layer reads in a batch that its range holds
    within: Annotated[float, In(0.5, 1)] = 1.0
    only: tuple[str, ...] = ()  # name patterns of the layers to consider
    exclude: tuple[str, ...] = ()  # name patterns of the layers to leave alone

    def prepare(self, run: Run) -> None:
        """Fold, choose bits, calibrate, and round from now on."""
        if not run.has_inputs and not run.steps:
            raise MethodError(
                "int4_gemm needs inputs to find the ranges of activations, but there are neither "
                "data nor steps of training: pass data."
            )
        run.apply(*foldable(run.model, run.example))
        looks = run.inputs(self.samples, batch=BATCH) if run.has_inputs else [run.example]
        ways = self._ways(run)
        scores: Mapping[str, list[float]] = {}
        if run.limits():
            moved = {name: [_moved(run, edit) for edit in row] for name, row in ways.items()}
            scores = damages(run.model, moved, looks[0])
        plan = spent(run, ways, scores, {})
        follow = Follow(self.momentum, self.within)
        seen = extents(run.model, list(plan), looks, follow)
        for name, edit in plan.items():
            assert isinstance(edit, Multiply)
            if name not in seen:
                run.keep(name, UNREACHED)
                continue
            layer, channels = run.model.get_submodule(name), edit.channels
            run.aside.put(Simulated(name, layer, edit.bits, seen[name], follow, channels=channels))

    def finalize(self, run: Run) -> None:
        """Turn rounded layers into layers of codes."""
        for simulated in run.aside.all(Simulated):
            values, bits = simulated.values(), simulated.rounded.bits
            groups = getattr(simulated.layer, "groups", 1)
            simulated.remove()
            edit = Multiply(simulated.name, bits, self.scales == "channel", groups)
            run.apply(replace(edit, values=values))

    def _ways(self, run: Run) -> dict[str, list[Edit]]:
        layers = packable(run.model, run.example, only=self.only, exclude=self.exclude)
        found: dict[str, list[Edit]] = {}
        reasons = dict(layers.reasons) | _unfit(layers)
        names = [name for name in layers.called if name not in reasons]
        for name in names:
            bits = CHOICES if run.limits() else (self.bits,)
            if name in (layers.reading[0], layers.reading[-1]):
                bits = (self.ends,)
            if bits == (0,):
                reasons[name] = "the first and the last layer were to stay in floating point"
                continue
            groups = getattr(layers.single[name], "groups", 1)
            ways = [Multiply(name, width, self.scales == "channel", groups) for width in bits]
            found[name] = list(ways)
        return smaller(run, found, reasons)


def _unfit(layers: Layers) -> dict[str, str]:
    """Say why layers that could be packed cannot multiply codes."""
    found = dict.fromkeys(layers.several, "it multiplies inside: its products have no codes")
    for name, layer in layers.single.items():
        if name in layers.tied or name in layers.tied.values():
            found[name] = "its weight is tied, and others read it as numbers"
        elif kinds.kind_of(layer) not in KINDS:
            found[name] = f"its class {type(layer).__name__} is no product of two matrices"
    return found


def _moved(run: Run, edit: Edit) -> dict[str, Tensor]:
    """By how much codes move the weight of a layer."""
    assert isinstance(edit, Multiply)
    layer: Any = run.model.get_submodule(edit.layer)
    weight = layer.weight.detach()
    scales, zero = weight_codes(weight, edit.bits, channels=edit.channels)
    scales = scales.view(-1, *[1] * (weight.dim() - 1))
    found = codes(weight.float(), scales, weight.new_tensor(zero), edit.bits)
    return {"weight": weight - (found.float() - zero) * scales}
