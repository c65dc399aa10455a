"""Checkpoints of which one bit is another: none may be resumed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pliant import compress
from pliant.data import Train
from pliant.drivers import checkpoint
from pliant.errors import ArtifactError


def trained(folder: Path, **more: Any) -> Any:
    """Train a small network with a checkpoint in a folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    plan = Train(epochs=1, batch=8, device="cpu", checkpoint_every=1)
    asked: dict[str, Any] = {"train": plan, "folder": folder, "strict": False}
    return compress(net, (x, torch.arange(40) % 4), "nrmf", "params=0.7", **asked, **more)


def run(count: int, folder: Path, seed: int = 0) -> dict[str, int]:
    """Flip single bits of a checkpoint anywhere, and read it again.

    Returns:
        How many were refused in words, and how many were taken.
    """
    choose, found = random.Random(seed), {"refused": 0, "taken": 0}
    trained(folder)
    path = folder / checkpoint.NAME
    whole = path.read_bytes()
    for _ in range(count):
        data = bytearray(whole)
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        path.write_bytes(data)
        try:
            checkpoint.read(folder, {})
            found["taken"] += 1
        except ArtifactError:
            found["refused"] += 1
    path.write_bytes(whole)
    return found
