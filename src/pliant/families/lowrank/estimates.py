"""Ranks that layers seem to have by themselves: by variational Bayes, and by their spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pliant.edits import Factor
from pliant.families.lowrank.factorize import Layers
from pliant.families.lowrank.weaken import form_of
from pliant.math.forms import max_ranks
from pliant.math.rank import evbmf_rank, stable_rank
from pliant.math.svd import spectrum, unfold
from pliant.nn.factorized import Factorizable
from pliant.nn.kinds import kernel
from pliant.observe.spectra import spectra

LITTLE = 0.5  # share of a layer's energy; a single direction that holds less is not all of it


def evbmf_ranks(module: Factorizable) -> tuple[int, ...]:
    """Ranks in the order of the form: (in, out) for Tucker-2, one for a matrix; 0 is all noise."""
    weight = kernel(module).detach()
    found = [
        evbmf_rank(sigma, tuple(unfold(weight, mode).shape))
        for mode, sigma in zip((1, 0), spectra(weight).values(), strict=True)
    ]
    return (found[1],) if form_of(module) == "svd" else tuple(found)


def doubtful(
    edits: Sequence[Factor],
    layers: Mapping[str, Factorizable],
    estimates: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """Warn of layers that go to a rank of 1 on an estimate of 0 or 1 that their energy belies."""
    found = {}
    for edit in edits:
        sides = ("in", "out") if edit.form == "tucker2" else ("out",)
        values = spectra(kernel(layers[edit.layer]))
        kept = [
            float(values[side][0].square() / values[side].square().sum())
            for side, rank, guess in zip(sides, edit.ranks, estimates[edit.layer], strict=True)
            if rank == 1 and guess <= 1
        ]
        if kept and min(kept) < LITTLE:
            found[edit.layer] = (
                f"EVBMF takes all but one direction for noise, which holds {min(kept):.0%} of the "
                f'energy: exclude "{edit.layer}" if the network suffers'
            )
    return found


def stable_ranks(layers: Layers) -> dict[str, float]:
    """Return the sum of the squared singular values over the largest of them, of every layer."""
    return {name: stable_rank(spectrum(kernel(m).detach(), 0)) for name, m in layers.items()}


def stable_estimates(
    layers: Layers, first: Mapping[str, float], form: str
) -> dict[str, tuple[int, ...]]:
    """Return full ranks times what is left of the stable rank, of every layer.

    Args:
        layers: as they are now.
        first: their stable ranks at first.
        form: of the factors.
    """
    found = {}
    for name, now in stable_ranks(layers).items():
        most = max_ranks(kernel(layers[name]).shape, form_of(layers[name], form))
        share = min(1.0, now / first[name])
        found[name] = tuple(max(1, round(share * top)) for top in most)
    return found
