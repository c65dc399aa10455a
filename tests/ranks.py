"""Two processes on one CPU that train together, and what each of them found."""

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def join(rank: int, port: int) -> None:
    """Let this process be one of two."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": 0}
    os.environ |= {name: str(value) for name, value in (world | address).items()}
    torch.set_num_threads(1)
    import lightning_fabric  # noqa: F401

    gc.freeze()  # garbage is collected after every edit: not among all that is imported


def leave(rank: int, folder: str, found: dict[str, Any]) -> None:
    """Keep what this process found, and part."""
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def both(worker: Callable[[int, int, str], None], folder: Path) -> list[dict[str, Any]]:
    """Call ``worker(rank, port, folder)`` in two processes, and return what each kept."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(worker, (port, str(folder)), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
