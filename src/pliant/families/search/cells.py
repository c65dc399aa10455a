"""Searches in networks of cells: what was found is a genotype."""

from __future__ import annotations

from pliant.errors import MethodError
from pliant.families.search.bilevel import choices, mend
from pliant.families.search.derive import choose
from pliant.nn.cells import CellNetwork, derive, placed
from pliant.nn.operations import SKIP
from pliant.run import Run


def network(run: Run, method: str) -> CellNetwork:
    """Return a run's network, which is made of cells.

    Raises:
        MethodError: it is none.
    """
    if not isinstance(run.model, CellNetwork):
        raise MethodError(
            f"{method} searches the mixed operations of a network of cells, not of a "
            f"{type(run.model).__name__}: begin with pliant.zoo.build('edarts-search')."
        )
    return run.model


def noted(run: Run, method: str) -> None:
    """Note the genotype without a limit on skip connections, if there is still something to choose.

    How many skip connections there are in the normal cell is noted too.
    """
    if not choices(run.model):
        return
    genotype = derive(network(run, method), most_skips=None)
    run.note(genotype=genotype.plain(), skips=genotype.count(SKIP))


def settle(run: Run, method: str, most_skips: int | None) -> None:
    """Note the genotype, leave its operations, and re-estimate batch norms.

    Args:
        run: of a search; where nothing is to be chosen, nothing is done.
        method: its name.
        most_skips: in a cell; see `derive`.
    """
    if not choices(run.model):
        return
    found = network(run, method)
    genotype = derive(found, most_skips=most_skips)
    run.note(genotype=genotype.plain(), skips=genotype.count(SKIP))
    choose(run, placed(found, genotype))
    mend(run)
