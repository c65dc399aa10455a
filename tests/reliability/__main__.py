"""Run a campaign: ``python -m tests.reliability files --cases 50000``."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path

import torch

from tests.reliability import files, flips, images, kills, options


def main() -> int:
    """Run one campaign and print its figures; the exit code is 1 if there was a surprise."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("what", choices=("files", "images", "flips", "kills", "options"))
    parser.add_argument("--cases", type=int, default=0, help="how many; of kills for each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", action="append", help="kills, options: only these")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    began, used = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="pliant-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        bad = _run(asked, Path(folder))
    took = f"{time.monotonic() - began:.0f} s, {time.process_time() - used:.0f} s of CPU"
    print(f"{'surprises' if bad else 'no surprises'} in {took}")
    return int(bad)


def _run(asked: argparse.Namespace, folder: Path) -> bool:
    if asked.what == "kills":
        rows = kills.run(asked.cases or 3, folder, asked.method or kills.methods(), asked.seed)
        total = {key: sum(row[key] for row in rows.values()) for key in ("equal", "different")}
        print(json.dumps(total | {"methods": len(rows)}))
        return any(row["different"] or row["failed"] for row in rows.values())
    if asked.what == "options":
        here = Path(__file__).with_name("options.jsonl")
        tried = options.run(asked.method or sorted(options.CASES), here)
        here.with_suffix(".md").write_text(options.table(tried))
        return not all(row["noticed"] for row in tried)
    if asked.what == "files":
        found = files.run(asked.cases or 2000, folder, asked.seed, progress=5000)
        print(json.dumps(found))
        return bool(found["raw"] or found["slow"])
    if asked.what == "images":
        counts = images.run(asked.cases or 1000, folder, asked.seed)
        print(json.dumps(counts))
        return bool(counts["raw"] or counts["opened"])
    counts = flips.run(asked.cases or 1000, folder, asked.seed)
    print(json.dumps(counts))
    return bool(counts["taken"])


if __name__ == "__main__":
    raise SystemExit(main())
