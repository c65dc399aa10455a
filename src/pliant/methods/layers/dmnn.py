"""DMNN: every input chooses which paths of which blocks run.

The file is long because blocks are put in, gated in training, and counted by what runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.cost import call, module_cost
from pliant.data import unpack
from pliant.edits import Swap
from pliant.errors import ModelError
from pliant.method import Method
from pliant.nn.paths import hidden_norms
from pliant.observe.watch import capture
from pliant.registry import In, Paper, register
from pliant.run import Run
from pliant.surgery.prove import prove_same
from pliant.surgery.select import check_names, matches


@register(
    "dmnn",
    paper=Paper(
        "Dynamic Multi-Path Neural Network",
        "Y. Su, Y. Wu, K. Chen, D. Liang, X. Hu",
        "ICPR",
        2020,
        "https://arxiv.org/abs/1902.10949",
    ),
)
@dataclass(frozen=True)
class DMNN(Method):
    """Divides residual blocks into paths with gates, so that each input chooses its network.

    A small recurrent controller for each block opens and closes its paths; a block whose paths are
    all closed is skipped. A penalty holds the mean share of multiply-accumulates that run at
    ``rate``, and where labels are classes, heads that guess them from the controllers' states
    teach these while they train. Paths divide the hidden channels, so the network begins as it
    was. It does not become smaller, and its counted cost is that of all paths: what runs depends
    on the input, and its share is noted at the end. Set ``sparse`` of a stage to run open paths
    alone; whether that is faster is for a measurement to say.

    *Departs from the paper*: controllers have a layer norm in the place of a batch norm, states
    begin anew in each stage, and the categories are the labels themselves. Paths of a block are a
    share of it, also where the paper makes bottlenecks anew, which are left alone here.

    >>> DMNN(paths=4, rate=0.7).width
    64
    """

    paths: Annotated[int, In(1, 64)] = 2  # N, of each block
    rate: Annotated[float, In(0, 1)] = 0.5  # t, share of the blocks' products that shall run
    width: Annotated[int, In(1, 1024)] = 64  # d, of the controllers' states
    strength: Annotated[float, In(0, 100)] = 2.0  # lambda_r, weight of (R - t)^2
    category: Annotated[float, In(0, 10)] = 0.1  # lambda_c, weight of the heads' loss
    temperature: Annotated[float, In(0.1, 10)] = 1.0  # tau, of the softmax gradients go through
    warm: Annotated[float, In(0, 1)] = 0.05  # share of the training in which all gates are open
    only: tuple[str, ...] = ()  # name patterns of the rows (nn.Sequential) to take
    exclude: tuple[str, ...] = ()  # name patterns of the rows to leave alone

    def prepare(self, run: Run) -> None:
        """Divide the blocks."""
        rows = dict(_rows(run.model, self.paths, self.only, self.exclude))
        costs: list[float] = []
        for name, blocks in rows.items():
            parts = module_cost(run.model, run.example, name).parts
            costs += [float(p.macs) for n, (_, p) in zip(blocks, parts, strict=True) if n]
        if not rows:
            raise ModelError(
                "dmnn needs rows of residual blocks, an nn.Sequential with inverted bottlenecks or "
                "blocks of conv1, bn1, conv2 and bn2 of enough channels, but the model has none "
                "that it may take."
            )
        for name in run.layers:
            run.keep(name, "no residual block of a row holds it, or the block cannot be divided")
        spec = {"paths": self.paths, "width": self.width, "classes": self._classes(run)}
        edits = [Swap(n, "multi_path", {"blocks": b, **spec}, run.seed) for n, b in rows.items()]
        prove_same(run.model, run.example, edits, "dmnn divides blocks into paths that add up")
        run.apply(*edits)
        run.state.update(stages=list(rows), costs=costs)
        self._watch(run)

    def loss(self, run: Run, loss: Tensor, output: Any, batch: Any) -> Tensor:
        """Add the distance from the rate, and what the heads lose."""
        seen = run.aside.get(_Seen)
        gates, states = seen.take()
        if not gates:
            return loss
        share = rate_of([gate.mean(0) for gate in gates], run.state["costs"])
        loss = loss + self.strength * (share - self.rate) ** 2
        heads = [head for stage in _stages(run) for head in stage.heads]
        if heads and self.category:
            labels = unpack(batch)[1]
            if labels.dim() == 1 and not labels.is_floating_point():
                labels = labels.to(states[0].device)
                told = [F.cross_entropy(h(s), labels) for h, s in zip(heads, states, strict=True)]
                loss = loss + self.category * torch.stack(told).mean()
        return loss

    def after_step(self, run: Run) -> None:
        """Let gates close when the warm-up is over."""
        self._force(run)

    @torch.no_grad()
    def finalize(self, run: Run) -> None:
        """Take the heads out, and note the share that runs and how many patterns of gates occur."""
        for stage in _stages(run):
            for controller in stage.controllers:
                controller.gate.forced.zero_()
        with_heads = [n for n, s in zip(run.state["stages"], _stages(run), strict=True) if s.heads]
        run.apply(*(Swap(name, "multi_path_routed") for name in with_heads))
        gates = gates_of(run)
        share = rate_of([gate.mean(0) for gate in gates], run.state["costs"])
        run.note(rate=float(share), patterns=len(torch.cat(gates, 1).unique(dim=0)))

    def _classes(self, run: Run) -> int:
        """Count the classes that heads guess; none where labels are no classes."""
        known = getattr(run.data, "classes", None) if self.category and run.has_inputs else None
        return (known if isinstance(known, int) else len(known)) if known else 0

    def _force(self, run: Run) -> None:
        early = bool(run.steps) and run.step < self.warm * run.steps
        for stage in _stages(run):
            for controller in stage.controllers:
                controller.gate.forced.fill_(float(early))

    def _watch(self, run: Run) -> None:
        seen = run.aside.put(_Seen())
        for stage in _stages(run):
            for controller in stage.controllers:
                controller.gate.temperature = self.temperature
                run.hook(controller.register_forward_hook(seen.see))
        self._force(run)


@dataclass
class _Seen:
    """What the controllers of a training batch gave."""

    given: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def see(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        """Keep the gates and the state of a block, with their graph."""
        if module.training and torch.is_grad_enabled():
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
        for name, stage in zip(run.state["stages"], _stages(run), strict=True)
        for number in range(len(stage.controllers))
    ]
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def see(name: str, given: Any, output: Any) -> None:
        found[name].append(output[0].detach())

    with capture(run.model, names, see):
        for batch in run.inputs(samples) if run.has_inputs else [run.example]:
            call(run.model, batch)
    return [torch.cat(gates) for gates in found.values()]


def _stages(run: Run) -> list[Any]:
    """The stages of the network, each a `MultiPathStage`."""
    return [run.model.get_submodule(name) for name in run.state["stages"]]


def _rows(
    model: nn.Module, paths: int, only: tuple[str, ...], exclude: tuple[str, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give the rows with blocks that can be divided, and how many hidden norms each block has."""
    rows = {n: m for n, m in model.named_modules() if n and type(m) is nn.Sequential}
    check_names(rows, (*only, *exclude))
    for name, row in rows.items():
        if (only and not matches(name, only)) or matches(name, exclude):
            continue
        blocks = tuple(hidden_norms(part, paths) for part in row.children())
        if any(blocks):
            yield name, blocks
