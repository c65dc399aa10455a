"""What README and pages show, with several seeds: no result may lose more than its bound.

Every Python block and every `pliant` command of a page runs in its order, on the whole data. A
result that is beyond its bound warns, and a command with one ends with its own exit code; a step
whose text asks for that, by `--allow-drop` or "or warns", is let off.
"""

from __future__ import annotations

import shlex
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pliant.api import job
from pliant.cli import app
from pliant.cli.console import DROPPED
from pliant.errors import AccuracyWarning
from tests import test_docs
from tests.test_docs import ROOT, RUN, Step, named, steps

LET_OFF = ("--allow-drop", "or warns")


def pages() -> list[Path]:
    """Name README and the pages that compress something."""
    return [page for page in RUN if page.parent != ROOT / "docs" / "methods" and _any(page)]


def _any(page: Path) -> bool:
    words = ("compress", "smallest", "auto", "sweep", "shortlist", "start(")
    return any(word in step.text for step in steps(page) for word in words)


def run(page: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Run a page with a seed of its own.

    Returns:
        How many steps ran, how many results were judged, how many of the steps gave one that is
        beyond its bound, and how many failed.
    """
    found: dict[str, Any] = {"steps": 0, "judged": 0, "beyond": 0, "failed": 0}
    with pytest.MonkeyPatch.context() as patch, _seeded(seed) as judged:
        desk = folder / f"{page.stem}-{seed}"
        desk.mkdir()
        test_docs.furnish(desk, patch, whole=True)
        home = test_docs.module(page, desk)
        torch.manual_seed(seed)
        for step in steps(page):
            found["steps"] += 1
            said = _step(step, home, desk)
            if said:
                found["beyond" if said.startswith("lost") else "failed"] += 1
                print(f"{named(page)}:{step.line} with seed {seed}: {said}", flush=True)
        found["judged"] = len(judged)
    return found


def _step(step: Step, home: Any, desk: Path) -> str:
    """Run a step; say what is wrong with how it ended."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            if step.kind == "python":
                test_docs.run_python(step, home, desk)
            elif step.text.startswith("pliant "):
                words = shlex.split(step.text, comments=True)[1:]
                ended = CliRunner().invoke(app, words)
                if ended.exit_code == DROPPED:
                    return "" if any(word in step.text for word in LET_OFF) else "lost too much"
                if ended.exit_code:
                    return f"exit code {ended.exit_code}: {ended.output[-300:]}"
        except Exception:
            return traceback.format_exc()[-400:]
    lost = [str(w.message) for w in seen if issubclass(w.category, AccuracyWarning)]
    judged = step.kind == "python" and not any(word in step.text for word in LET_OFF)
    return f"lost: {lost[0]}" if lost and judged else ""


@contextmanager
def _seeded(seed: int) -> Iterator[list[Any]]:
    """Add to the seed of every compression, and collect their verdicts."""
    go, judge, judged = job.Job.go, job.judge, []

    def moved(asking: Any, **asked: Any) -> Any:
        asking.seed += seed
        torch.manual_seed(asking.seed)
        return go(asking, **asked)

    def collected(*asked: Any) -> Any:
        judged.append(judge(*asked))
        return judged[-1]

    job.Job.go, job.judge = moved, collected  # type: ignore[method-assign]
    try:
        yield judged
    finally:
        job.Job.go, job.judge = go, judge  # type: ignore[method-assign]
