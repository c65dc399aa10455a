"""What campaigns found, kept in a file from which the docs are made: with seed, commit and date."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
MOST = ("largest tensor", "largest objects")  # of a case, in bytes
ROOT = Path(__file__).resolve().parents[2]


def read(path: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """Return the entries of every campaign, the oldest first."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def find(what: str, seed: int, cases: int, path: Path = RESULTS) -> dict[str, Any] | None:
    """Return the entry of a campaign that was recorded before; None if there is none."""
    rows = read(path).get(what, [])
    return next((row for row in rows if (row["seed"], row["cases"]) == (seed, cases)), None)


def write(
    what: str, seed: int, cases: int, found: dict[str, Any], cpu: float, path: Path = RESULTS
) -> None:
    """Put an entry in the place of that of the same seed and number of cases.

    Args:
        what: the campaign.
        seed: of its cases.
        cases: how many; of kills for each method.
        found: its figures.
        cpu: seconds.
        path: of the file.
    """
    entry = {
        "command": f"python -m tests.reliability {what} --cases {cases} --seed {seed}",
        "seed": seed,
        "cases": cases,
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "cpu_seconds": round(cpu),
        "found": found,
    }
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held = read(path)
        rows = [r for r in held.get(what, []) if (r["seed"], r["cases"]) != (seed, cases)]
        held[what] = [*rows, entry]
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        part.replace(path)
    path.with_suffix(".lock").unlink(missing_ok=True)


def total(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Add counts up; of what is no count the largest counts."""
    found: dict[str, Any] = {}
    for row in rows:
        for key, value in row.items():
            one = found.get(key, 0)
            found[key] = (
                one + value if isinstance(value, int) and key not in MOST else max(one, value)
            )
    return found


def _commit() -> str:
    """The commit that the code is of, marked where the tree differs from it."""
    given = {"cwd": ROOT, "text": True, "capture_output": True, "check": True}
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **given).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "src", "tests"], **given).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    ours = [line for line in changed.splitlines() if "results" not in line]
    return f"{head}+" if ours else head
