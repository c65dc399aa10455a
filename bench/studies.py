"""Several small studies in one bench: each has rivals, seeds and a table of its own."""

from collections.abc import Callable, Mapping
from typing import Any

from bench.experiments import Cells, Table, pick, values
from bench.stats import mean

Said = Callable[[list[Any], str], str]


def summary(settings: Mapping[str, Any], cells: Cells) -> list[dict[str, Any]]:
    """Give the means of all numbers that were measured, a row for each rival of each study."""
    rows = []
    for study, plan in settings["studies"].items():
        for name in plan["rivals"]:
            found = [cell["values"] for cell in pick(cells, study=study, rival=name)]
            keys = [k for k in (found[0] if found else {}) if isinstance(found[0][k], int | float)]
            means = {key: mean([row[key] for row in found]) for key in keys}
            rows.append({"study": study, "rival": name, "seeds": len(found), **means})
    return rows


def tables(settings: Mapping[str, Any], cells: Cells, said: Said) -> list[Table]:
    """Give a table for each study.

    Args:
        settings: of the bench.
        cells: measured ones.
        said: writes the values of all seeds down, given what was measured.
    """
    found = []
    for study, plan in settings["studies"].items():
        words = plan["words"]
        rows = [
            [name, *(said(values(cells, key, study=study, rival=name), key) for key in words)]
            for name in plan["rivals"]
        ]
        found.append(Table(plan["title"], ["", *words.values()], rows))
    return found
