"""Turns channels that leave into edits, and proves on a copy that the rest computes the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import nn

from pliant.cost import Example, call_alike, twin
from pliant.edits import Edit, replay
from pliant.edits.prune import Prune
from pliant.edits.sides import (
    each_of,
    every_side,
    is_tensor,
    over_all,
    tensor_of,
    without_statistics,
)
from pliant.errors import EditError
from pliant.nn.kinds import in_rows
from pliant.observe.outputs import alike, answers
from pliant.surgery.even import evened, some_of
from pliant.surgery.graph import MEET, Group, trace
from pliant.surgery.marks import Slot
from pliant.surgery.passes import first_sample, randomized, reaching, slow_attention

Leaving = Mapping[str, Sequence[int]]
"""For every group by name, the units that leave."""

UNEVEN = "it can lose channels only with as many of others, which have another number of them"
WITHOUT = "without some of its channels"

CLOSE = 1e-4  # largest difference that rounding may make, relative to the largest output


def cuttable(
    model: nn.Module, example: Example, batches: Iterable[Example] = ()
) -> tuple[list[Group], dict[str, str]]:
    """Find the groups of channels that are proven to be removable, and why others are not.

    Half of the units of all groups are removed from a copy with random weights, at once. Where
    that fails, the groups are split until those that fail are alone; the others are tried again.

    Args:
        model: not touched.
        example: the inputs of one forward call.
        batches: more inputs, asked for where the example calls not all layers.

    Returns:
        The groups in the order of the model, and a reason for every layer with channels all of
        which stay.

    Raises:
        ModelError: the network answers with no tensor that could be compared.
    """
    random = randomized(model)
    others = reaching(random, example, batches)
    examples, seen = [example, *others], dict[str, dict[str, Any]]()
    ways = [_traced(random, examples, seen)]
    if "heads" in seen and _meeting(*ways[0]):
        ways.insert(0, _traced(random, examples, **seen["heads"]))
    good, uneven, reasons = _proven(random, examples, *ways[0])
    for more in ways[1:]:
        good, uneven, reasons = _better(random, examples, (good, uneven, reasons), more)
    for name in list(seen) if uneven or _lost(reasons) else ():
        if name != "heads" or len(ways) == 1:
            more = _traced(random, examples, **seen[name])
            good, uneven, reasons = _better(random, examples, (good, uneven, reasons), more)
    if not good:  # as a last resort: statistics of norms are then those of what stays
        good, uneven, reasons = _by_norms(random, examples, (good, uneven, reasons))
    for group in uneven:
        reasons |= {layer: UNEVEN for layer, side in group.slots if side != "in"}
    changed = {layer for group in good for layer, side in group.slots if side != "in"}
    return good, {layer: why for layer, why in reasons.items() if layer not in changed}


Traced = tuple[list[Group], list[Group], dict[str, str]]
"""Groups that are proven, those that only equal numbers may leave, why layers keep channels."""


def _by_norms(random: nn.Module, examples: Sequence[Example], before: Traced) -> Traced:
    """Trace again past norms that take their statistics over all channels, where there are any."""
    if not any(over_all(module) for module in random.modules()):
        return before
    found = _proven(random, examples, *_traced(random, examples, apart=True))
    norms = {name for name, module in random.named_modules() if over_all(module)}
    passed = any(layer in norms for group in found[0] for layer, _ in group.slots)
    return found if passed else before


def _traced(
    random: nn.Module,
    examples: Sequence[Example],
    seen: dict[str, dict[str, Any]] | None = None,
    **how: Any,
) -> tuple[list[Group], dict[str, str]]:
    """Trace briefly if there is one example, and in full where what is found so does not hold."""
    seen = {} if seen is None else seen
    first, *others = examples
    found = trace(random, first, others, brief=not others, seen=seen, **how)
    if seen.pop("short", None) is not None:
        uneven = {group.name: some_of(group, place) for place, group in enumerate(found[0])}
        if _problem(random, examples, edits_of(random, found[0], uneven)):
            found = trace(random, first, others, seen=seen, **how)
    return found


def _meeting(found: Sequence[Group], reasons: Mapping[str, str]) -> bool:
    """Say whether there are layers all of whose channels meet, as those of heads do."""
    leaving = {layer for group in found for layer, side in group.slots if side != "in"}
    return any(why == MEET and layer not in leaving for layer, why in reasons.items())


def _better(
    random: nn.Module,
    examples: Sequence[Example],
    before: Traced,
    found: tuple[list[Group], dict[str, str]],
) -> Traced:
    """Return what is proven of what another trace found, if it is more than before."""
    most = _channels(before[0])
    if _channels(found[0]) <= most:
        return before
    again = _proven(random, examples, *found)
    return again if _channels(again[0]) > most else before


def _proven(
    random: nn.Module,
    examples: Sequence[Example],
    found: Sequence[Group],
    reasons: Mapping[str, str],
) -> Traced:
    good, reasons = list(found), dict(reasons)
    while failing := _failing(random, examples, sorted(good, key=lambda g: len(g.slots))):
        for group in good:
            for layer, side in group.slots if group.name in failing else ():
                if side != "in":
                    reasons[layer] = f"{WITHOUT} {failing[group.name]}"
        good = [group for group in good if group.name not in failing]

    def fails(some: Sequence[Group], leaving: Leaving) -> bool:
        return bool(_problem(random, examples, edits_of(random, some, leaving)))

    for some in _as_many([group for group in found if group not in good]):
        if not fails(some, {group.name: _every_second(group) for group in some}):
            good = [group for group in found if group in good or group in some]
    good, uneven = evened(good, fails) if good else ([], [])
    return good, uneven, reasons


def _as_many(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that have as many units as others: what fails alone may leave in equal numbers."""
    counts = dict.fromkeys(len(group.units) for group in groups)
    sets = [[group for group in groups if len(group.units) == count] for count in counts]
    return [some for some in sets if len(some) > 1]


def _lost(reasons: Mapping[str, str]) -> bool:
    return any(why.startswith(WITHOUT) for why in reasons.values())


def _channels(groups: Sequence[Group]) -> int:
    """How many outputs of layers there are in groups."""
    return sum(
        len(unit[place])
        for group in groups
        for unit in group.units
        for place, (_, side) in enumerate(group.slots)
        if side == "out"
    )


def edits_of(model: nn.Module, groups: Iterable[Group], leaving: Leaving) -> list[Prune]:
    """Return the edits that remove units, in the order of the model.

    Inputs of a layer come before its outputs; of a grouped convolution after them, since it has
    no outputs of its own once every group reads one channel.
    """
    return edits_at(dict(model.named_modules()), gone_by_slot(groups, leaving))


def gone_by_slot(groups: Iterable[Group], leaving: Leaving) -> dict[Slot, set[int]]:
    """Return which channels of which sides of layers leave with units."""
    gone: dict[Slot, set[int]] = {}
    for group in groups:
        for unit in leaving.get(group.name, ()):
            for slot, channels in zip(group.slots, group.units[unit], strict=True):
                gone.setdefault(slot, set()).update(channels)
    return gone


def edits_at(modules: Mapping[str, nn.Module], gone: Mapping[Slot, Set[int]]) -> list[Prune]:
    """Return the edits of some layers that remove channels, in the order of these layers."""
    return [
        Prune(
            *(name, side, tuple(sorted(set(range(size)) - gone[name, side])), size),
            each=each_of(module, side),
        )
        for name, module in modules.items()
        for side, size in sorted(every_side(module).items(), reverse=_grouped(module))
        if (name, side) in gone
    ]


def _grouped(module: nn.Module) -> bool:
    groups = getattr(module, "groups", 1)
    return isinstance(groups, int) and groups > 1


def prove(
    model: nn.Module,
    example: Example,
    edits: Sequence[Prune],
    batches: Iterable[Example] = (),
) -> None:
    """Make sure that a cut network runs, and computes what the whole one does without them.

    Both are tried as copies with random weights: in the whole one, all that reads the channels
    that leave ignores them. So it is the structure that is proven, whatever the weights are.

    Raises:
        EditError: the cut network fails in forward, or computes something else.
    """
    random = randomized(model)
    if problem := _problem(random, [example, *reaching(random, example, batches)], edits):
        raise EditError(f"These channels cannot be removed: without them {problem}.")


def unproven(
    model: nn.Module,
    example: Example,
    groups: Sequence[Group],
    leaving: Leaving,
    batches: Iterable[Example] = (),
) -> dict[str, str]:
    """Name the groups whose units cannot leave as planned, and say what happens without them.

    It is the proof of `prove`, for all groups at once; where it fails, they are split until those
    that fail are alone. Nothing is named where all that is planned may leave.

    Args:
        model: not touched.
        example: the inputs of one forward call.
        groups: of channels, proven before for other units.
        leaving: the units that are to leave.
        batches: as for `cuttable`.
    """
    random = randomized(model)
    examples = [example, *reaching(random, example, batches)]
    found: dict[str, str] = {}
    cut = [group for group in groups if leaving.get(group.name)]
    while failing := _failing(random, examples, [g for g in cut if g.name not in found], leaving):
        found |= failing
    return found


def prove_same(model: nn.Module, example: Example, edits: Sequence[Edit], sentence: str) -> None:
    """Make sure that an edited network runs, and computes what it did before.

    Both are tried as copies with random weights, in evaluation.

    Args:
        model: not touched.
        example: the inputs of one forward call.
        edits: what is to be done.
        sentence: how the refusal begins.

    Raises:
        EditError: the edited network fails in forward, or computes something else.
    """
    random = randomized(model)
    if problem := differs(random, example, random, edits):
        raise EditError(f"{sentence}: with the edits {problem}.")


def ignore(model: nn.Module, edits: Iterable[Prune]) -> None:
    """Let all layers ignore, in place, the inputs that edits would remove."""
    for edit in edits:
        if edit.side == "in":
            module: Any = model.get_submodule(edit.layer)
            groups = getattr(module, "groups", 1)
            width = edit.of // groups
            with in_rows(module, module.weight.detach()) as rows:
                blocks = rows.unflatten(0, (groups, -1))
                for channel in edit.removed():
                    blocks[channel // width, :, channel % width] = 0


def silence(model: nn.Module, edits: Iterable[Prune]) -> None:
    """Zero, in place, all that makes the channels that edits would remove, norms included."""
    for edit in edits:
        module, gone = model.get_submodule(edit.layer), list(edit.removed())
        if is_tensor(edit.side):
            name, axis = tensor_of(edit.side)
            getattr(module, name).detach().movedim(axis, 0)[gone] = 0
            continue
        for name in ("weight", "bias") if edit.side != "in" else ():
            tensor = getattr(module, name, None)
            if tensor is not None:
                with in_rows(module, tensor.detach()) as rows:
                    rows.unflatten(0, (edit.of, -1))[gone] = 0


# ---------------------------------------------------------------- proofs


def _failing(
    random: nn.Module,
    examples: Sequence[Example],
    groups: Sequence[Group],
    leaving: Leaving | None = None,
) -> dict[str, str]:
    """Name the groups that cannot be cut, and what happens then; in halves, if not as planned."""
    if not groups:
        return {}
    units = leaving or {group.name: _every_second(group) for group in groups}
    problem = _problem(random, examples, edits_of(random, groups, units))
    if not problem:
        return {}
    if len(groups) == 1:
        return {groups[0].name: problem}
    middle = len(groups) // 2
    first = _failing(random, examples, groups[:middle], leaving)
    second = _failing(random, examples, groups[middle:], leaving)
    if first or second:
        return first | second
    return {group.name: f"and of others {problem}" for group in groups}


def _every_second(group: Group) -> list[int]:
    """Half of the units in no regular pattern, always the same."""
    generator = torch.Generator().manual_seed(len(group.units))
    order: list[int] = torch.randperm(len(group.units), generator=generator).tolist()
    return order[: len(order) // 2]


def _problem(random: nn.Module, examples: Sequence[Example], edits: Sequence[Prune]) -> str:
    """Say what goes wrong in a cut network, or nothing."""
    whole = twin(random)
    ignore(whole, edits)
    found = (differs(whole, example, random, edits) for example in examples)
    return next(filter(None, found), "")


def differs(whole: nn.Module, example: Example, random: nn.Module, edits: Sequence[Edit]) -> str:
    """Say how a network differs from what another becomes by edits, or nothing.

    Args:
        whole: not touched.
        example: the inputs of one forward call.
        random: not touched either; a copy of it is edited.
        edits: what is to be done.
    """
    edited = twin(random)
    replay(edited, edits)
    sample, norms = first_sample(example, random), norms_cut(random, edits)
    with torch.no_grad(), slow_attention():
        wanted = answers(call_alike(_apart(whole, norms), sample))
        try:
            found = answers(call_alike(edited, sample))
            if norms:  # it runs; the rest is compared as if each channel were by itself
                found = answers(call_alike(_apart(edited, norms), sample))
        except Exception as error:  # a model may fail in any way
            cause = error.__cause__ or error
            line = str(cause).strip().splitlines()[0] if str(cause).strip() else ""
            return f"the forward pass fails ({type(cause).__name__}: {line[:120]})"
    same = alike(wanted, found, CLOSE)
    return "" if same else "the rest of the network computes something else"


def norms_cut(model: nn.Module, edits: Iterable[Edit]) -> list[str]:
    """Name the norms over all channels that edits would leave fewer channels."""
    cut = [edit.layer for edit in edits if isinstance(edit, Prune)]
    return [layer for layer in cut if over_all(model.get_submodule(layer))]


def _apart(model: nn.Module, norms: Sequence[str]) -> nn.Module:
    """Copy a network whose norms take no statistics."""
    if not norms:
        return model
    network = twin(model)
    for name in norms:
        module: Any = network.get_submodule(name)
        module.forward = partial(without_statistics, module)
    return network
