"""From mixed operations to a plain network: every one becomes one of its candidates."""

from __future__ import annotations

from collections.abc import Mapping

from pliant.edits import Choose
from pliant.families.search import objective
from pliant.families.search.bilevel import mixed
from pliant.run import Run


def best(run: Run) -> dict[str, str]:
    """Return for every mixed operation the candidate with the largest logit."""
    return {name: part.best() for name, part in mixed(run.model).items()}


def noted(run: Run) -> dict[str, str]:
    """Note the best candidates and what the network costs with them; return their names.

    Args:
        run: whose candidates, if it has any, have prices.
    """
    found = best(run)
    if found:
        run.note(ops=list(found.values()), cost=objective.now(run, found))
    return found


def settle(run: Run) -> None:
    """Leave the best candidate of every mixed operation, and say so of all layers."""
    choose(run, noted(run))
    for layer in run.layers.keys() - run.reasons.keys():
        run.keep(layer, "there was nothing to choose")


def choose(run: Run, chosen: Mapping[str, str]) -> None:
    """Put candidates in the places of mixed operations, and say so of all layers in them.

    Args:
        run: whose network has them.
        chosen: the name of a candidate for every mixed operation.
    """
    edits = [Choose(layer, op) for layer, op in chosen.items()]
    for edit in edits:
        _say_why(run, edit)
    run.apply(*edits)


def _say_why(run: Run, edit: Choose) -> None:
    """Every layer of a candidate has a row in the report."""
    inside = f"{edit.layer}.ops."
    for layer in run.layers:
        if layer.startswith(inside):
            kept = layer.removeprefix(inside).startswith(f"{edit.op}.")
            run.keep(layer, f"moved to {edit.layer}" if kept else f"{edit.op} was chosen instead")
