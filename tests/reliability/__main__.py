"""Run a campaign: ``python -m tests.reliability files --cases 50000``."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.reliability import commands, files, flips, images, kills, numerics, options, record

CHUNK = 2500  # files of one entry
USUAL = {"commands": 3, "files": CHUNK, "flips": 1000, "images": 1000, "kills": 5, "numerics": 800}
BAD = ("beyond", "raw", "slow", "opened", "taken", "untrue", "different", "failed")


def main() -> int:
    """Run one campaign and print its figures; the exit code is 1 if there was a surprise."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("what", choices=(*USUAL, "options"))
    parser.add_argument(
        "--cases", type=int, default=0, help="how many; kills of each method, seeds of commands"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", action="append", help="kills, options: only these")
    parser.add_argument(
        "--record", action="store_true", help=f"into {record.RESULTS.name}; goes on where it ended"
    )
    asked = parser.parse_args()
    asked.cases = asked.cases or USUAL.get(asked.what, 0)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began, used = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="pliant-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        found = _run(asked, Path(folder))
    bad = any(row.get(key) for row in found for key in BAD)
    took = f"{time.monotonic() - began:.0f} s, {time.process_time() - used:.0f} s of CPU"
    print(f"{'surprises' if bad else 'no surprises'} in {took}")
    return int(bad)


def _run(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run what was asked for, in parts that are recorded one by one."""
    if asked.what == "kills":
        return _kills(asked, folder)
    if asked.what == "commands":
        return _commands(asked, folder)
    if asked.what == "options":
        return _options(asked)
    parts = [(asked.seed, asked.cases)]
    if asked.what == "files":
        starts = range(0, asked.cases, CHUNK)
        parts = [(asked.seed + i, min(CHUNK, asked.cases - at)) for i, at in enumerate(starts)]
    rows = []
    for seed, cases in parts:
        known = record.find(asked.what, seed, cases) if asked.record else None
        if known is None:
            place = folder / str(seed)
            place.mkdir()
            used = time.process_time()
            found = ONE[asked.what](cases, place, seed)
            if asked.record:
                record.write(asked.what, seed, cases, found, time.process_time() - used)
        rows.append(known["found"] if known else found)
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _numerics(cases: int, folder: Path, seed: int) -> dict[str, Any]:
    return numerics.run(numerics.drawn(cases, seed), folder, seed, progress=200)


def _commands(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run README and the pages, each page with each seed; what is over is recorded."""
    known = record.find("commands", asked.seed, asked.cases) if asked.record else None
    rows: dict[str, dict[str, Any]] = dict(known["found"]) if known else {}
    used = sum(os.times()[:4]) - (known["cpu_seconds"] if known else 0)
    for seed in range(asked.seed, asked.seed + asked.cases):
        for page in commands.pages():
            name = f"{commands.named(page)}, seed {seed}"
            if name not in rows:
                rows[name] = commands.run(page, folder, seed)
                print(f"{name}: {rows[name]}", flush=True)
                if asked.record:
                    spent = sum(os.times()[:4]) - used
                    record.write("commands", asked.seed, asked.cases, rows, spent)
    print(json.dumps(record.total(rows.values())))
    return list(rows.values())


def _options(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Ignore every option of methods in turn; what no check notices is beyond what is allowed."""
    here = Path(__file__).with_name("options.jsonl")
    tried = options.run(asked.method or sorted(options.CASES), here)
    here.with_suffix(".md").write_text(options.table(tried))
    return [{"tried": len(tried), "raw": sum(not row["noticed"] for row in tried)}]


def _kills(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Kill trainings of one method after the other; each is recorded when it is over."""
    known = record.find("kills", asked.seed, asked.cases) if asked.record else None
    rows: dict[str, dict[str, int]] = dict(known["found"]) if known else {}
    used = sum(os.times()[:4]) - (known["cpu_seconds"] if known else 0)
    for name in asked.method or kills.methods():
        if name not in rows:
            rows |= kills.run(asked.cases, folder, [name], asked.seed)
            if asked.record:
                record.write("kills", asked.seed, asked.cases, rows, sum(os.times()[:4]) - used)
    print(json.dumps(record.total(rows.values()) | {"methods": len(rows)}))
    return list(rows.values())


ONE: dict[str, Callable[[int, Path, int], dict[str, Any]]] = {
    "files": files.run,
    "flips": flips.run,
    "images": images.run,
    "numerics": _numerics,
}


if __name__ == "__main__":
    raise SystemExit(main())
