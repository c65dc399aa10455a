"""The machine a training runs on: devices, processes, memory layout, random states."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pliant.data import Train
from pliant.errors import MethodError, TrainingError, must_be
from pliant.math.alone import forked

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def fabric_of(train: Train) -> "Fabric":
    """Set up the devices of a plan; imported here, since the import takes its time."""
    from lightning_fabric import Fabric

    if train.devices > 1 and "LOCAL_RANK" not in os.environ:
        raise TrainingError(
            f"Training on {train.devices} devices needs as many processes, but this one is alone; "
            f"start the script with torchrun --nproc-per-node {train.devices}."
        )
    kind, _, index = train.device.partition(":")
    world = int(os.environ.get("WORLD_SIZE", train.devices)) if train.devices > 1 else 1
    try:
        fabric = Fabric(
            accelerator=kind,
            devices=[int(index)] if index else train.devices,
            num_nodes=max(1, world // train.devices),
            # a search may run one of several paths, and leave the others without gradients
            strategy="ddp_find_unused_parameters_true" if train.devices > 1 else "auto",
            precision=train.precision,  # type: ignore[arg-type]  # checked by Train
        )
        fabric.launch()
    except Exception as error:
        raise TrainingError(
            f"Training needs a device {train.device!r} that can do {train.precision}, but there is "
            f"none: {error}; use device='cpu', precision='32-true'."
        ) from error
    return fabric


@contextmanager
def fast_layout(model: nn.Module) -> Iterator[None]:
    """Keep kernels of 2-d convolutions in channels_last, if they are not there already."""
    convs = any(isinstance(module, nn.Conv2d) for module in model.modules())
    kernels = [p for p in model.parameters() if p.dim() == 4] if convs else []
    done = all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    for kernel in kernels:
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for kernel in [p for p in model.parameters() if p.dim() == 4 and not done]:
            kernel.data = kernel.data.contiguous()


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global random state for a while, and put the caller's back; other threads wait.

    Raises:
        MethodError: the seed is no whole number.
    """
    must_be(Integral, "seed", seed, MethodError, "a whole number")
    with forked([device] if device.type == "cuda" else [], seed):
        yield


def take_step(fabric: "Fabric", optimizers: Sequence[Optimizer]) -> None:
    """Let every optimizer step; a scaler of gradients, if there is one, moves on once."""
    from lightning_fabric.plugins import MixedPrecision

    plugin = fabric.strategy.precision
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    for optimizer in optimizers:
        if scaler is None:
            fabric.strategy.optimizer_step(optimizer)
        else:
            scaler.step(optimizer)
    if scaler is not None:
        scaler.update()


@contextmanager
def differentiable() -> Iterator[None]:
    """Let a method take gradients of its own, which Fabric forbids with mixed precision.

    Fabric fears gradients that nobody scales; those that a method takes are not meant for a step.
    """
    from lightning_fabric import wrappers

    wrappers._in_fabric_backward = True
    try:
        yield
    finally:
        wrappers._in_fabric_backward = False


def agree(model: nn.Module, world: int, *, weights: bool = True) -> None:
    """Give all processes the statistics of process 0 and, unless told not to, its weights.

    Between two forward passes of DDP only the weights are equal: every process has gathered the
    statistics of its own batches. What a method plans from them must be the same everywhere.
    """
    if world > 1:
        for tensor in (*(model.parameters() if weights else ()), *model.buffers()):
            torch.distributed.broadcast(tensor.detach(), 0)


def mean(fabric: "Fabric", value: float) -> float:
    """Average a number over all processes."""
    every = _gathered(fabric, torch.tensor(value, device=fabric.device))
    return float(torch.stack(every).mean()) if len(every) > 1 else value


def random_states(fabric: "Fabric") -> list[Tensor]:
    """Collect the random states of all processes, one a row: the CPU's and CUDA's."""
    states = [torch.get_rng_state()]
    if fabric.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(fabric.device))
    return [torch.stack(_gathered(fabric, state.to(fabric.device))).cpu() for state in states]


def restore_random(fabric: "Fabric", saved: list[Tensor]) -> None:
    """Put back what `random_states` collected, as far as this machine is like that one."""
    # A copy: set_rng_state reads from the start of the storage, whichever row it is given.
    states = [rows[fabric.global_rank % len(rows)].clone() for rows in saved]
    torch.set_rng_state(states[0])
    if fabric.device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], fabric.device)


def _gathered(fabric: "Fabric", tensor: Tensor) -> list[Tensor]:
    if fabric.world_size == 1:
        return [tensor]
    every = [torch.empty_like(tensor) for _ in range(fabric.world_size)]
    torch.distributed.all_gather(every, tensor)
    return every
