"""Result files: assembled from cells, read back for claims and report."""

import json
import os
from pathlib import Path
from typing import Any

from bench import experiments, history
from bench.experiments import Cells, Experiment
from bench.provenance import provenance

RESULTS = Path(__file__).parent / "results"


def assemble(experiment: Experiment, cells: Cells) -> dict[str, Any]:
    """Put together what a result file holds; claims and summary are computed from the cells."""
    settings = experiment.settings
    return judge(
        {
            "bench": experiment.name,
            "title": settings["title"],
            "quick": experiment.quick,
            "provenance": provenance(cells, getattr(experiment.code, "LIBRARIES", ())),
            "settings": settings,
            "cells": cells,
        }
    )


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """Compute claims and summary of a result from its cells, and what changed since its plan."""
    settings, cells = result["settings"], result["cells"]
    judging = experiments.code(settings)
    changed = None if result["quick"] else history.since_planned(result["bench"], settings)
    return {
        **{name: result[name] for name in ("bench", "title", "quick", "provenance", "settings")},
        "changed": changed,
        "claims": judging.claims(settings, cells),
        "summary": judging.summary(settings, cells),
        "cells": cells,
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, path)


def read_all(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Read all results, sorted by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
