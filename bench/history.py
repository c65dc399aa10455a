"""What became of a plan: budgets, seeds and targets that changed since it was first committed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bench.provenance import git

WATCHED = ("seeds", "few", "budgets", "budget", "macs", "share", "smallest", "sizes", "claims")
"""Settings that decide what is shown, whatever else is in the plan."""

Plan = Mapping[str, Any]
Change = dict[str, Any]  # what, planned, measured; and of a change in the history when it was made


TEXTS = ("title", "about", "quick", "drawings")  # say things, and decide nothing


def changes(planned: Plan, measured: Plan, *, all_settings: bool = False) -> list[Change]:
    """List the budgets, seeds and targets in which two plans differ; or all that differs."""
    first, last = (_watched(plan, everything=all_settings) for plan in (planned, measured))
    return [
        {"what": what, "planned": first.get(what), "measured": last.get(what)}
        for what in dict.fromkeys((*first, *last))
        if first.get(what) != last.get(what)
    ]


def since_planned(name: str, settings: Plan) -> list[Change] | None:
    """List what a result was measured with and its plan, as first committed, had otherwise.

    Each change comes with the commit and the day of the last time at which it was touched, and
    with the word whether a result had been committed by then. None where there is no history.
    """
    plans = _commits(f"bench/experiments/{name}.json")
    if not plans or git("rev-parse", "--is-shallow-repository") != "false":
        return None
    results = _commits(f"bench/results/{name}.json")
    versions = [(commit, day, _plan(commit, name)) for commit, day in plans]
    found = changes(versions[0][2], settings)
    for change in found:
        steps = zip(versions, versions[1:], strict=False)
        touched = [new for old, new in steps if _differ(old[2], new[2], change["what"])]
        commit, day = touched[-1][:2] if touched else ("", "")
        after = bool(results) and bool(commit) and _is_ancestor(results[0][0], commit)
        change |= {"commit": commit, "day": day, "after_result": after}
    return found


def said(rows: Sequence[Change]) -> str:
    """Write changes in a sentence each."""
    return "; ".join(
        f"{row['what']} {_short(row['planned'])} → {_short(row['measured'])}{_when(row)}"
        for row in rows
    )


def _when(row: Change) -> str:
    if not row.get("commit"):
        return ""
    order = "after" if row["after_result"] else "before"
    return f" ({row['day']}, {row['commit']}, {order} the first committed result)"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _watched(plan: Plan, path: str = "", *, everything: bool = False) -> dict[str, Any]:
    """The settings that are watched, by their path: one entry for each value below them."""
    found: dict[str, Any] = {}
    for name, value in plan.items():
        here = f"{path}.{name}" if path else name
        if name in TEXTS and not path:
            continue
        if isinstance(value, Mapping):
            found |= _watched(value, here, everything=everything)
        elif everything or any(part in WATCHED for part in here.split(".")):
            found[here] = sorted(value) if _numbers(value) else value
    return found


def _numbers(value: Any) -> bool:
    """Whether this is a list of numbers, of which the order says nothing."""
    return isinstance(value, list) and all(isinstance(each, int | float) for each in value)


def _differ(old: Plan, new: Plan, what: str) -> bool:
    return bool(_watched(old).get(what) != _watched(new).get(what))


def _commits(path: str) -> list[tuple[str, str]]:
    """Commits that touched a file and left it there, the oldest first, with their days."""
    lines = git("log", "--reverse", "--diff-filter=AM", "--format=%h %cs", "--", path).splitlines()
    return [(line.split()[0], line.split()[1]) for line in lines]


def _plan(commit: str, name: str) -> Plan:
    found: Plan = json.loads(git("show", f"{commit}:bench/experiments/{name}.json"))
    return found


def _is_ancestor(one: str, other: str) -> bool:
    return git("merge-base", one, other)[:7] == one[:7]
