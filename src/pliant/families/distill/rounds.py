"""Rounds in which layers get new channels, are compared, and one of them keeps what it got.

The state of a run holds ``edits`` that brought the channels of this round, ``new``, which numbers
of every parameter are new, and ``kept``, what the parameters were.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pliant.edits import Prune, Widen, from_json, to_json
from pliant.families.distill import growth
from pliant.run import Run

Choice = Literal["validation", "gain", "random"]


def plant(run: Run, channels: int) -> None:
    """Let every layer have new channels that it may, and hold all else fast.

    Args:
        run: about to begin a round.
        channels: that come to each layer.
    """
    run.state["round"] += 1
    edits = growth.plants(run, channels, run.seed + run.state["round"])
    new = growth.planted(run.model, edits) if edits else run.state["new"]
    run.apply(*edits)
    run.state["edits"] = to_json(edits)
    _hold(run, new)


def choose(run: Run, choice: Choice, samples: int) -> None:
    """Leave new channels in the layer in which they are worth most only.

    Args:
        run: in a round.
        choice: see `best`.
        samples: see `best`.
    """
    edits = [edit for edit in from_json(run.state["edits"]) if isinstance(edit, Widen)]
    found = growth.candidates(run, edits)
    chosen, loss = best(run, found, choice, samples)
    cuts, before = found[chosen], run.edits[: len(run.edits) - len(edits)]
    new = {name: mask.float() for name, mask in run.state["new"].items()}
    new = {name: value > 0.5 for name, value in growth.carried(run.model, new, cuts).items()}
    run.apply(*cuts)
    run.restate([*before, *growth.joined(edits, cuts)])
    run.state["edits"] = []
    _hold(run, new)
    run.recalibrate()
    run.note(planted=chosen, loss=loss, params=run.planner.now().params)


def best(
    run: Run, found: dict[str, list[Prune]], choice: Choice, samples: int
) -> tuple[str, float | None]:
    """Return the layer whose new channels stay, "" for none, and the loss with them.

    Args:
        run: in a round.
        found: see `growth.candidates`.
        choice: the least loss, the most gained per parameter, or any.
        samples: of the validation split, on which layers are compared.
    """
    names = [name for name in found if name] or [""]
    if choice == "random" or not names[0]:
        return names[int(torch.randint(len(names), (1,), generator=run.generator))], None
    known = {name: growth.judged(run, cuts, samples) for name, cuts in found.items()}
    chosen = growth.most_gained(known, per_parameter=choice == "gain")
    return chosen, known[chosen][0]


@torch.no_grad()
def mask(run: Run) -> None:
    """Leave gradients to numbers that are new only."""
    for name, new in run.state["new"].items():
        if (gradient := run.model.get_parameter(name).grad) is not None:
            gradient.mul_(new)


@torch.no_grad()
def hold(run: Run) -> None:
    """Put all older numbers back: decay and momentum have moved them too."""
    for name, old in run.state["kept"].items():
        parameter = run.model.get_parameter(name)
        parameter.copy_(torch.where(run.state["new"][name], parameter, old))


def due(run: Run, first: float, rounds: int) -> Literal["plant", "choose"] | None:
    """Say what the present step is: the beginning or the middle of a round, or neither.

    Args:
        run: whose steps are known.
        first: share of the training before the first round.
        rounds: at most; the rest of the training is divided among them.
    """
    begun = max(1, round(first * run.steps))
    rounds = min(rounds, (run.steps - begun) // 2)
    if run.step < begun or rounds < 1:
        return None
    length = (run.steps - begun) // rounds
    number, place = divmod(run.step - begun, length)
    if number < rounds and not place:
        return "plant"
    return "choose" if place == length // 2 and run.state["edits"] else None


def _hold(run: Run, new: dict[str, Tensor]) -> None:
    """Remember which numbers are new, and what the others are."""
    kept = {name: run.model.get_parameter(name).detach().clone() for name in new}
    run.state.update(new=new, kept=kept)
