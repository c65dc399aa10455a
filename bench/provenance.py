"""Where a result comes from: the commit, the machine, the versions, the date."""

import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bench.data import ROOT
from pliant.api.report import versions


def now() -> str:
    """Return the time to the second, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")


def source() -> dict[str, Any]:
    """Return the commit, and whether code of package or benches differs from it."""
    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", "src", "bench/*.py", "bench/experiments")
    return {"commit": commit or "unknown", "dirty": bool(changed) or not commit}


def provenance(cells: Iterable[Mapping[str, Any]], libraries: Iterable[str]) -> dict[str, Any]:
    """Gather what all cells have in common, and what the versions are."""
    cells = list(cells)
    found = versions()
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    seeds = {cell["key"]["seed"] for cell in cells if "seed" in cell["key"]}
    return {
        "date": max((cell["date"] for cell in cells), default=now()),
        "commits": sorted({cell["commit"] for cell in cells}),
        "dirty": any(cell["dirty"] for cell in cells),
        "machine": found.pop("machine"),
        "versions": found,
        "seeds": sorted(seeds),
        "seconds": round(sum(cell["seconds"] for cell in cells), 1),
    }


def git(*words: str) -> str:
    """Return what git says in this checkout; nothing where it cannot."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
