"""Files that are damaged or made to do harm: each loads, or is refused in words, at little cost.

A case takes an honest file apart, changes its manifest, its tensors or its coded bytes where the
format says something, signs the hash anew, and loads it.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import pliant
from pliant.edits import (
    EDITS,
    Choose,
    Encode,
    Factor,
    Fold,
    Insert,
    Merge,
    Multiply,
    Nest,
    Pack,
    Prune,
    Quantize,
    Remove,
    Rerank,
    Settle,
    Swap,
    Widen,
    replay,
)
from pliant.errors import PliantError
from pliant.files import artifact
from pliant.files.artifact import MANIFEST, WEIGHTS
from tests.counts import largest, most

Build = Callable[[], nn.Module]
SLOW = 1.0  # seconds of CPU that a case may take
MEASURED = 10  # one case in so many is loaded again, and what it allocates is measured


class Several(nn.Module):
    """A network with layers of most kinds, small."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
        )
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.row(x).flatten(2).transpose(1, 2)
        found: torch.Tensor = self.head(self.second(self.first(self.lstm(maps)[0][:, -1])))
        return found


CONV = {"channels": 8, "kernel": 3, "dims": 2, "identity": True}
PLANS: dict[str, tuple[Any, ...]] = {
    "factors": (
        Factor("row.0", "spatial", (4,)),
        Factor("second", "svd", (5,)),
        Rerank("second", "svd", (3,)),
    ),
    "elastic": (Nest("first", "svd", (5, 4, 2)), Settle("row.1", 3)),
    "packed": (
        Quantize("row.0", 4, 2, False),
        Pack("lstm", 3, 2, True, (24, 192, 24, 144)),
        Quantize("head", 2, 4, False),
    ),
    "codes": (Multiply("first", 4, True, 1), Encode("second", "hac", 0)),
    "channels": (
        Prune("row.0", "out", (0, 2, 3), 8),
        Prune("row.1", "channels", (0, 2, 3), 8),
        Prune("row.3", "in", (0, 2, 3), 8),
        Widen("first", "out", (*range(16), 0, -1), 16),
        Widen("second", "in", (*range(16), 0, -1), 16),
    ),
    "others": (
        Fold("row.1", "row.0"),
        Insert("row", "residual", CONV, 1),
        Insert("row", "scatter", {"places": (1, 0), "of": 8}, 0),
        Insert("row", "copy", {"start": "same"}, 1),
        Remove("row.2"),
        Swap("row.0", "separable", {"multiplier": 1}),
        Merge("first", "second", 12, True),
    ),
}
LAYERS = ("", "row", "row.0", "row.1", "row.3", "lstm", "first", "second", "head", "head.reduce")


def honest(folder: Path) -> list[tuple[Path, Build | None]]:
    """Write one file of each plan, plain and coded, and one of a network of the zoo."""
    found: list[tuple[Path, Build | None]] = []
    for name, plan in PLANS.items():
        model, done = built(), []
        for edit in plan:
            try:
                replay(model, [edit := _fitting(edit, model)], weights=True)
            except PliantError:  # values are needed: shapes do as well
                replay(model, [edit], weights=False)
            done.append(edit)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_((tensor * 8).round() / 8)
        path = folder / f"{name}.pliant"
        found.append((artifact.save(path, model, done, extra={"classes": 4}), built))
        coded = folder / f"{name}-coded.pliant"
        found.append((artifact.save(coded, model, done, encode="auto"), built))
    network = pliant.zoo.build("lenet5")
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.copy_((tensor * 16).round() / 16)
    extra = {"classes": 10, "input": [1, 28, 28], "class_names": ["a"] * 10}
    for name, encode in (("zoo", None), ("zoo-hac", "hac"), ("zoo-ans", "ans")):
        told: dict[str, Any] = {"source": "lenet5", "extra": extra, "encode": encode}
        found.append((artifact.save(folder / f"{name}.pliant", network, (), **told), None))
    return found


def built() -> nn.Module:
    """Build the dense network, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Several().eval()


def _fitting(edit: Any, model: nn.Module) -> Any:
    if not isinstance(edit, Encode):
        return edit
    from pliant.codecs import address_map
    from pliant.codecs.tensors import patterns

    weight = model.get_submodule(edit.layer).weight
    with torch.no_grad():
        weight.copy_((weight * 4).round() / 4)  # type: ignore[operator]
    data = address_map.encode(patterns(weight), edit.form)  # type: ignore[arg-type]
    return Encode(edit.layer, edit.form, len(data), "float32", data)


# ---------------------------------------------------------------- changing


NUMBERS = (
    *(0, 1, 2, 3, 7, 8, 64, 255, 2**16, 10**6, 2**31, 2**40, 2**63, 10**30, -1, -3, -(2**31)),
    *(0.5, 1e30, -0.0, 1e-300, True, None, "", "x", "\x1b[2J" * 3, "\u202e", "a." * 100),
)
KEYS = {
    "layer": LAYERS, "into": LAYERS, "reader": LAYERS, "source": (*LAYERS, "vgg16-bn"),
    "edit": tuple(EDITS), "side": ("in", "out", "channels"),
    "form": ("svd", "spatial", "tucker2", "input", "output", "hac", "shac", "ans", "conv",
             "linear", "residual", "copy", "gather", "scatter", "identity", "biased", "separable"),
    "dtype": ("float32", "float64", "float16", "int8", "int64", "uint8", "bool", "bfloat16"),
    "shortcut": ("0", "layer", ""),
}  # fmt: skip
FRESH: tuple[Any, ...] = (
    *(edit for plan in PLANS.values() for edit in plan if not isinstance(edit, Encode)),
    Choose("row", "skip"),
    Settle("row.1", 10**6),
    Nest("first", "svd", tuple([5] * 2000)),
    Insert("row", "conv", CONV | {"channels": 10**7}),
    Insert("row", "scatter", {"places": (0,), "of": 2**20}),
    Insert("first", "linear", {"features": 10**5, "identity": True}),
    Insert("", "copy", {"start": "same"}),
    Widen("head", "out", tuple(n % 4 for n in range(3000)), 4),
    Swap("row.0", "separable", {"multiplier": 9}),
)


def _change(manifest: dict[str, Any], choose: random.Random) -> None:
    """Change one thing that the manifest says."""
    way = choose.randrange(9)
    edits = manifest["edits"]
    if way == 0 and edits:
        edits.insert(choose.randrange(len(edits) + 1), dict(choose.choice(edits)))
    elif way == 1 and edits:
        edits.pop(choose.randrange(len(edits)))
    elif way == 2:
        many = choose.choice((1, 1, 1, 2, 50))
        new = pliant.edits.to_json([choose.choice(FRESH)])
        edits[(at := choose.randrange(len(edits) + 1)) : at] = json.loads(json.dumps(new * many))
    elif way == 3:
        choose.shuffle(edits)
    elif way == 4:
        row = choose.choice(list(manifest["tensors"].values()))
        row["shape"] = choose.choice(
            ([1] * 100_000, [2**40] * 60, [0], row["shape"][::-1], row["shape"] * 2, [10**6] * 2)
        )
    elif way == 5 and (names := list(manifest["tensors"])):
        old = choose.choice(names)
        new = choose.choice((*names, "x", "\x1b]0;a\x07", "n" * 10_000))
        manifest[choose.choice(("tensors", "aliases"))][new] = manifest["tensors"].pop(old)
    else:
        _change_value(manifest, choose)


def _change_value(manifest: dict[str, Any], choose: random.Random) -> None:
    """Go down to a value anywhere, and put another one in its place."""
    at: Any = manifest if choose.random() < 0.4 else manifest["edits"] or manifest
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return
        key = choose.choice(keys)
        held = at[key]
        if isinstance(held, dict | list) and held and choose.random() < 0.9:
            at = held
            continue
        if key in KEYS and choose.random() < 0.7:
            at[key] = choose.choice(KEYS[key])
        elif isinstance(held, int) and choose.random() < 0.5:
            at[key] = choose.choice((held + 1, held - 1, held * 2, -held, held * 10**5))
        elif isinstance(held, list) and choose.random() < 0.5:
            at[key] = choose.choice((held * 2, held * 500, held[::-1], held[:-1], [held]))
        else:
            at[key] = choose.choice(NUMBERS)
        return


def _spoil(tensors: dict[str, torch.Tensor], coded: list[str], choose: random.Random) -> None:
    """Change tensors: coded bytes above all."""
    name = choose.choice(coded or list(tensors))
    tensor = tensors[name].clone()
    way = choose.randrange(4)
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor
    if way < 2 and flat.numel():
        for _ in range(choose.choice((1, 1, 2, 8))):
            place = choose.randrange(min(len(flat), choose.choice((16, 40, len(flat)))))
            flat[place] = choose.choice((0, 1, 255, choose.randrange(256)))
    elif way == 2:
        tensor = tensor.reshape(-1)[: max(1, tensor.numel() // 2)].clone()
    else:
        tensor = torch.zeros(choose.choice((0, 1, 16, 64)), dtype=torch.uint8)
    tensors[name] = tensor


def mutated(data: bytes, choose: random.Random) -> bytes:
    """Return a file with one to three changes, whose hash is right again in most cases."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        manifest, weights = json.loads(archive.read(MANIFEST)), archive.read(WEIGHTS)
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        try:
            if choose.random() < 0.65:
                _change(manifest, choose)
            elif choose.random() < 0.8:
                tensors = safetensors.torch.load(weights)
                _spoil(tensors, list(manifest.get("coded", ())), choose)
                weights = safetensors.torch.save(tensors)
                for name in manifest.get("coded", ()):
                    manifest["coded"][name] = tensors[name].numel()
            else:
                spot = choose.randrange(min(len(weights), choose.choice((8, 400, len(weights)))))
                weights = weights[:spot] + bytes([choose.randrange(256)]) + weights[spot + 1 :]
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
            continue  # an earlier change left nothing to change here
        except safetensors.SafetensorError:
            continue
    if choose.random() < 0.95 and isinstance(manifest, dict):
        manifest["sha256"] = hashlib.sha256(weights).hexdigest()
    found = io.BytesIO()
    kind = choose.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(found, "w", kind) as archive:
        archive.writestr(MANIFEST, json.dumps(manifest))
        archive.writestr(WEIGHTS, weights)
    written = bytearray(found.getvalue())
    if choose.random() < 0.03:
        written[choose.randrange(len(written))] ^= 1 << choose.randrange(8)
    return bytes(written)


# ---------------------------------------------------------------- loading


def run(count: int, folder: Path, seed: int = 0, *, progress: int = 0) -> dict[str, Any]:
    """Load changed files one after the other.

    Returns:
        How many loaded and were refused; surprises, which are other exceptions and cases that
        took more than a second; the slowest case in seconds of CPU; and of one case in so many
        how large the largest tensor was, and all Python objects at once, beside those of the
        honest file that takes most.
    """
    choose, seeds = random.Random(seed), honest(folder)
    texts = [(path.read_bytes(), build) for path, build in seeds]
    honestly = [_allocated(path, build, way) for path, build in seeds for way in range(4)]
    tensor, objects = map(max, zip(*honestly, strict=True))
    found: dict[str, Any] = {"loaded": 0, "refused": 0, "raw": 0, "slow": 0, "slowest": 0.0}
    found |= {"largest tensor": 0.0, "largest objects": 0.0}
    path = folder / "case.pliant"
    for number in range(count):
        data, build = choose.choice(texts)
        path.write_bytes(mutated(data, choose))
        began = time.process_time()
        try:
            _load(path, build, choose.randrange(4))
            found["loaded"] += 1
        except PliantError as error:
            found["refused"] += 1
            if not str(error).isprintable() or len(str(error)) > 4000:
                found["raw"] += 1
                print(f"case {number}: a message that no terminal should see: {str(error)[:200]!r}")
        except Exception as error:
            found["raw"] += 1
            print(f"case {number}: {type(error).__name__}: {str(error)[:300]}")
            (folder / f"raw-{number}.pliant").write_bytes(path.read_bytes())
        took = time.process_time() - began
        if took > SLOW:
            found["slow"] += 1
            print(f"case {number}: {took:.1f} s for {path.stat().st_size:,} bytes")
            (folder / f"slow-{number}.pliant").write_bytes(path.read_bytes())
        found["slowest"] = max(found["slowest"], round(took, 3))
        if number % MEASURED == 0:
            one, other = _allocated(path, build, number // MEASURED % 4)
            found["largest tensor"] = max(found["largest tensor"], round(one / tensor, 2))
            found["largest objects"] = max(found["largest objects"], round(other / objects, 2))
        if progress and number % progress == progress - 1:
            print(number + 1, found, flush=True)
    return found


def _load(path: Path, build: Build | None, way: int) -> None:
    """Load as users do: into a network, by a function, or at a size; then look inside."""
    if way == 0 and build is not None:
        pliant.load(path, build())
    elif way == 1:
        pliant.load(path, build, at=0.5)
    else:
        pliant.load(path, build)


def _allocated(path: Path, build: Build | None, way: int) -> tuple[int, int]:
    """Load again; return the bytes of the largest tensor, and those of objects held at once."""

    def work() -> None:
        with suppress(Exception):  # what it is, the load that was counted has said
            _load(path, build, way)

    return largest(work), most(work)
