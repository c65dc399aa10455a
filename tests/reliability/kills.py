"""Trainings of every method, killed anywhere and resumed: the result must be the same, bit by bit.

A training runs in a process of its own, a fork of this one, and is killed by SIGKILL at a step
or at a moment between two. Whatever it leaves must be gone or harmless when it is resumed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pliant import compress
from pliant.data import Train
from pliant.data.digest import digest_of
from pliant.drivers.devices import fabric_of
from pliant.edits import to_json
from pliant.errors import PliantError
from pliant.registry import get
from pliant.testing.case import Case
from pliant.testing.toys import Toy
from tests.cases import CASES

PLAN = Train(
    epochs=2, finetune=1, batch=4, lr=0.01, warmup=0.1, device="cpu", checkpoint_every=1
)  # 16 samples: 8 steps of the search, 4 of fine-tuning
LONGEST = 300.0  # seconds of one training


def methods() -> list[str]:
    """Name the methods that compress and can be trained."""
    return [name for name in CASES if get(name).verb == "compress" and CASES[name].toys]


def run(kills: int, folder: Path, names: list[str], seed: int = 0) -> dict[str, dict[str, int]]:
    """Kill trainings of each method, resume them and compare.

    Returns:
        For each method how many were equal, differed, failed, or could not be trained.
    """
    fabric_of(PLAN)  # imports what every child would import anew
    found = {}
    for name in names:
        found[name] = _method(name, kills, folder / name, random.Random(f"{seed} {name}"))
        print(f"{name}: {found[name]}", flush=True)
    return found


def _method(name: str, kills: int, folder: Path, choose: random.Random) -> dict[str, int]:
    case, counts = CASES[name], {"equal": 0, "different": 0, "failed": 0}
    toy = next(toy for toy in case.shown() if toy.name not in case.refuses)
    began = time.monotonic()
    whole = _forked(lambda: _train(case, toy, folder / "whole", resume=False), folder / "whole")
    took = time.monotonic() - began
    if whole is None:
        return counts | {"untrained": 1}
    for number in range(kills):
        place = folder / str(number)
        for _ in range(choose.choice((1, 1, 2))):  # some are killed twice
            at = choose.randrange(1, 12) if choose.random() < 0.5 else took * choose.random()
            _forked(_dying(case, toy, place, at), place, until=at)
        again = _forked(lambda place=place: _train(case, toy, place, resume=True), place)
        left = [path.name for path in place.rglob("*") if path.suffix in (".part", ".lock")]
        ended = "failed" if again is None or left else "equal" if again == whole else "different"
        counts[ended] += 1
    return counts


def _dying(case: Case, toy: Toy, folder: Path, at: float) -> Callable[[], str]:
    """A training that is killed after a step; one that is killed at a moment just goes on."""

    def go() -> str:
        steps: list[int] = []

        def watch(row: dict[str, Any]) -> None:
            steps.extend([1] if "step" in row else [])
            if isinstance(at, int) and len(steps) >= at:
                os.kill(os.getpid(), signal.SIGKILL)

        return _train(case, toy, folder, resume=True, watch=watch)

    return go


def _train(case: Case, toy: Toy, folder: Path, *, resume: bool, watch: Any = None) -> str:
    """Train a toy; return what came out as one digest."""
    result = compress(
        toy.model(),
        toy.data(),
        case.built(),
        case.bounds(),
        train=PLAN,
        example=toy.inputs(1),
        folder=folder,
        resume=resume,
        strict=False,
        watch=watch,
    )
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result.report.history]
    edits = json.dumps([to_json(result.edits), rows], sort_keys=True, default=str)
    return digest_of(edits, *result.model.state_dict().values())


def _forked(work: Callable[[], str], folder: Path, until: float = LONGEST) -> str | None:
    """Do work in a process of its own; None if it was killed, or failed."""
    folder.mkdir(parents=True, exist_ok=True)
    answer = folder.with_suffix(".answer")
    answer.unlink(missing_ok=True)
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        _work(work, answer)
    end = time.monotonic() + (LONGEST if isinstance(until, int) else until)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.002)
    return answer.read_text() if answer.exists() else None


def _work(work: Callable[[], str], answer: Path) -> None:
    """The life of a child."""
    try:
        warnings.simplefilter("ignore")
        part = answer.with_suffix(".writing")
        part.write_text(work())
        part.rename(answer)
    except PliantError as error:
        print(f"  refused: {error}", flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)
