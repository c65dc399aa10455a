"""The table of docs/reliability.md, made of what campaigns found.

``python -m tests.reliability.page`` writes it anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tests.reliability import record

PATH = record.ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- campaigns: made by python -m tests.reliability.page -->", "<!-- end -->"
WHAT = {
    "kills": "kills of trainings, and the training resumed",
    "files": "changed `.pliant` files, hashes signed anew",
    "flips": "flipped bits of a checkpoint, anywhere in the file",
    "images": "hostile image folders and parquet files",
    "numerics": "odd weights, inputs, labels, networks, options, budgets and trainings",
    "commands": "blocks and commands of README and pages",
}
ORDER = {
    "kills": {"equal": "equal to the last bit", "different": "different", "failed": "failed"},
    "files": {
        "loaded": "loaded",
        "refused": "refused",
        "raw": "other exceptions",
        "slow": "slower than a second",
    },
    "flips": {"refused": "refused", "taken": "resumed"},
    "images": {
        "refused": "refused in words",
        "loaded": "loaded",
        "opened": "programs started",
        "raw": "other exceptions",
    },
    "numerics": {
        "true": "results that are finite and true",
        "refused": "refused in a sentence",
        "raw": "other exceptions",
        "untrue": "results that are not true",
    },
    "commands": {
        "judged": "results judged",
        "beyond": "beyond their bound",
        "failed": "failed",
    },
}


def table(held: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Write a row for every campaign that was recorded."""
    lines = ["| campaign | tried | found | commands |", "|---|---|---|---|"]
    for what in WHAT:
        if entries := held.get(what):
            lines.append(f"| {' | '.join(_row(what, entries))} |")
    return "\n".join(lines)


def _row(what: str, entries: Sequence[Mapping[str, Any]]) -> tuple[str, str, str, str]:
    nested = what in ("kills", "commands")
    rows = [row for e in entries for row in (e["found"].values() if nested else [e["found"]])]
    found = record.total(rows)
    said = [f"{found.get(key, 0):,} {text}" for key, text in ORDER[what].items()]
    if "largest tensor" in found:
        most = max(found["largest tensor"], found["largest objects"])
        said.append(f"the most that was allocated was {most:g} times that of an honest file")
    if "slowest" in found:
        said.append(f"the slowest took {found['slowest']:.2g} s")
    tried = sum(found.get(key, 0) for key in _counted(what))
    if what == "kills":
        names = {name for entry in entries for name in entry["found"]}
        count = f"{tried:,}, of {len(names)} methods"
    elif what == "commands":
        count = f"{found['steps']:,} steps, {len(rows)} pages and seeds"
    else:
        count = f"{tried:,}"
    return WHAT[what], count, ", ".join(said), _how(what, entries)


def _counted(what: str) -> tuple[str, ...]:
    """Which counts together are all that was tried."""
    left = ("slow", "opened")
    return tuple(key for key in ORDER[what] if key not in left)


def _how(what: str, entries: Sequence[Mapping[str, Any]]) -> str:
    seeds = sorted({entry["seed"] for entry in entries})
    of = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    commits = ", ".join(sorted({entry["commit"].rstrip("+")[:7] for entry in entries}))
    spent = sum(entry["cpu_seconds"] for entry in entries)
    first = re.sub(r" --seed \d+", "", entries[0]["command"])
    return f"`{first}`, {of}; {entries[-1]['date']}, commit {commits}, {spent:,} s"


def replaced(text: str, held: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Put the table of now in the place of the old one."""
    start, rest = text.split(BEGIN)
    return f"{start}{BEGIN}\n{table(held)}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    PATH.write_text(replaced(PATH.read_text("utf-8"), record.read()), encoding="utf-8")
