"""Fold: batch norms and pointwise layers disappear into the layers before them."""

from __future__ import annotations

from dataclasses import dataclass

from pliant.method import Method
from pliant.registry import Paper, register
from pliant.run import Run
from pliant.surgery.fold import foldable, mergeable
from pliant.surgery.select import weighted


@register(
    "fold",
    paper=Paper(
        "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only "
        "Inference",
        "B. Jacob, S. Kligys, B. Chen, M. Zhu, M. Tang, A. Howard, H. Adam, D. Kalenichenko",
        "CVPR",
        2018,
        "https://arxiv.org/abs/1712.05877",
    ),
)
@dataclass(frozen=True)
class Fold(Method):
    """Makes the same function in fewer layers, as the last step before a network is shipped.

    In evaluation a batch norm multiplies channels by fixed numbers and shifts them, so it can
    be a part of the convolution or Linear before it. The same holds for a pointwise layer that
    follows another layer directly: both are one product of matrices. They are merged where that
    takes fewer MACs: at a bottleneck without an activation, or where a layer was factorized and
    its first, narrow factor stands behind another linear layer. Every change is proven on a copy
    that must answer as the network does. Nothing is approximated; put it last in a chain, since
    what is trained after it is trained without batch norms.

    *Departs from the paper*: it folds once and at the end, where the paper trains with folded
    weights that it quantizes; merging pointwise layers is not in it.

    >>> import pliant, torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))
    >>> pliant.compress(model, None, "fold", example=torch.zeros(1, 3, 4, 4)).model
    Sequential(
      (0): Conv2d(3, 2, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): Identity()
    )
    """

    norms: bool = True  # fold batch norms into the layer before them: eq. (14)
    merge: bool = True  # merge a pointwise layer into the one before it, where MACs fall

    def finalize(self, run: Run) -> None:
        """Fold, merge what then stands side by side, and say what became of the layers."""
        folds = foldable(run.model, run.example) if self.norms else []
        run.apply(*folds)
        merges = mergeable(run.model, run.example) if self.merge else []
        run.apply(*merges)
        took = {fold.into: f"{fold.layer} is a part of it now" for fold in folds}
        for name in weighted(run.model):
            if name in run.layers and name not in run.reasons:  # an earlier stage may have its own
                run.keep(name, took.get(name, "nothing follows that can become a part of it"))
        for merge in merges:
            run.keep(merge.reader, f"it is a part of {merge.layer} now")
