"""Blocks with paths and gates: which can be divided so, what gates said, and what share runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import call, module_cost
from pliant.errors import ModelError
from pliant.nn.paths import hidden_norms
from pliant.observe.aside import is_other_batch
from pliant.observe.watch import capture
from pliant.run import Run
from pliant.surgery.select import check_names, matches


@dataclass
class Seen:
    """What the controllers of a training batch gave."""

    given: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def see(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        """Keep the gates and the state of a block, with their graph."""
        if module.training and torch.is_grad_enabled() and not is_other_batch():
            self.given.append(output)

    def take(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return all gates and states since the last time."""
        gates, states = [g for g, _ in self.given], [s for _, s in self.given]
        self.given.clear()
        return gates, states

    def remove(self) -> None:
        """Forget all of it, at the end of the run."""
        self.given.clear()


def rate_of(gates: list[Tensor], costs: list[float]) -> Tensor:
    """Return the share of products that run: R = sum of c g over the sum of c.

    Args:
        gates: of each block, the mean of each path (paths,).
        costs: products of each block, which its paths share evenly.
    """
    shares = torch.stack([gate.mean() for gate in gates])
    weights = torch.tensor(costs, dtype=shares.dtype, device=shares.device)
    return (shares * weights).sum() / weights.sum()


def gates_of(run: Run, samples: int = 512) -> list[Tensor]:
    """Return the gates of every block for training inputs, (inputs, paths) each.

    Args:
        run: of a network with paths; without data the example is looked at.
        samples: how many inputs at least.
    """
    names = [
        f"{name}.controllers.{number}"
        for name, stage in zip(run.state["stages"], stages(run), strict=True)
        for number in range(len(stage.controllers))
    ]
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def see(name: str, given: Any, output: Any) -> None:
        found[name].append(output[0].detach())

    with capture(run.model, names, see):
        for batch in run.inputs(samples) if run.has_inputs else [run.example]:
            call(run.model, batch)
    return [torch.cat(gates) for gates in found.values()]


def stages(run: Run) -> list[Any]:
    """Return the stages of the network, each a `pliant.nn.multipath.MultiPathStage`."""
    return [run.model.get_submodule(name) for name in run.state["stages"]]


def with_heads(run: Run) -> list[str]:
    """Name the stages that have heads."""
    found = zip(run.state["stages"], stages(run), strict=True)
    return [name for name, stage in found if stage.heads]


def force(run: Run, *, opened: bool) -> None:
    """Hold all gates open, or let them close."""
    for controller in _controllers(run):
        controller.gate.forced.fill_(float(opened))


def watch(run: Run, temperature: float) -> None:
    """Keep what controllers give in training, and set the temperature of their gates."""
    seen = run.aside.put(Seen())
    for controller in _controllers(run):
        controller.gate.temperature = temperature
        run.hook(controller.register_forward_hook(seen.see))


def guesses(run: Run, states: list[Tensor], labels: Any) -> Tensor | None:
    """Return what the heads lose that guess labels from states; None without heads or classes.

    Args:
        run: of a network with paths.
        states: of the controllers, (N, width) each.
        labels: of the batch; class numbers (N,) are guessed.
    """
    heads = [head for stage in stages(run) for head in stage.heads]
    if not heads or labels.dim() != 1 or labels.is_floating_point():
        return None
    labels = labels.to(states[0].device)
    each = [  # states are in the precision of autocast, heads are called outside of it
        F.cross_entropy(head(state.to(head.weight.dtype)), labels)
        for head, state in zip(heads, states, strict=True)
    ]
    return torch.stack(each).mean()


def divisible(
    model: nn.Module, paths: int, only: Sequence[str], exclude: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Return the rows with blocks that can be divided, and how many hidden norms each block has.

    Raises:
        MethodError: a name pattern fits no row.
        ModelError: there is none.
    """
    rows = {n: m for n, m in model.named_modules() if n and type(m) is nn.Sequential}
    check_names(rows, (*only, *exclude))
    found = {}
    for name, row in rows.items():
        if (only and not matches(name, only)) or matches(name, exclude):
            continue
        blocks = tuple(hidden_norms(part, paths) for part in row.children())
        if any(blocks):
            found[name] = blocks
    if not found:
        raise ModelError(
            "dmnn needs rows of residual blocks, an nn.Sequential with inverted bottlenecks or "
            "blocks of conv1, bn1, conv2 and bn2 of enough channels, but the model has none that "
            "it may take."
        )
    return found


def products_of(run: Run, rows: Mapping[str, tuple[int, ...]]) -> list[float]:
    """Return the multiply-accumulates of every block that can be divided, in order."""
    costs: list[float] = []
    for name, blocks in rows.items():
        parts = module_cost(run.model, run.example, name).parts
        costs += [float(p.macs) for n, (_, p) in zip(blocks, parts, strict=True) if n]
    return costs


def classes_of(run: Run) -> int:
    """Count the classes of the labels; 0 where labels are no classes."""
    known = getattr(run.data, "classes", None) if run.has_inputs else None
    return (known if isinstance(known, int) else len(known)) if known else 0


def _controllers(run: Run) -> Iterator[Any]:
    for stage in stages(run):
        yield from stage.controllers
