"""Finds blocks and layers that can be taken out, and proves on a copy that the rest stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.cost import Example, call, twin
from pliant.edits import Edit, Prune, Remove
from pliant.errors import EditError
from pliant.nn.filters import WEIGHTED
from pliant.observe.watch import capture
from pliant.surgery.graph import Group, trace
from pliant.surgery.passes import first_sample, randomized
from pliant.surgery.prove import differs, edits_of, ignore
from pliant.surgery.select import UNCALLED

_ENDS = (*WEIGHTED, _BatchNorm)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
Appended = Mapping[str, Sequence[Group]]
"""For blocks that append channels to what they read: these channels, and all that reads them."""


def removable(model: nn.Module, example: Example) -> tuple[list[Remove], dict[str, str]]:
    """Find the blocks and layers that are proven to be removable, and why others are not.

    A block is any module with layers in it that is no mere row. It is removable where, if its
    branch gave nothing, it would be an identity or one of its own children (a projection), with a
    rectifier behind or without. A convolution or Linear is removable where it keeps shapes, and a
    block that appends channels to what it reads, as in a DenseNet, where all that reads these can
    do without them.

    Args:
        model: not touched.
        example: the inputs of one forward call.

    Returns:
        An edit for every such block or layer, in the order of the model, each proven by itself
        (see `without`); and a reason for every other.

    Raises:
        ModelError: the network answers with no tensor that could be compared.
    """
    random = randomized(model)
    seen = _look(random, example)
    channels = _appended(random, example, seen)
    found, reasons = [], {}
    for name, module in random.named_modules():
        if not name or not _may_leave(module):
            continue
        edits, reasons[name] = _candidates(random, name, seen)
        for edit in [Remove(name)] if name in channels else edits:
            problem = _problem(random, example, [edit], seen, channels)
            if not problem:
                found.append(edit)
                del reasons[name]
                break
            reasons[name] = f"without it {problem}"
    return found, reasons


def prove_removed(model: nn.Module, example: Example, edits: Sequence[Remove]) -> None:
    """Make sure that a network without some blocks runs, and computes what it did if they gave 0.

    Both are tried as copies with random weights: in the whole one the branches of those blocks end
    in zeros, layers without a shortcut pass what comes, and nothing reads what blocks append. So it
    is the structure that is proven.

    Raises:
        EditError: the smaller network fails in forward, or computes something else.
    """
    random = randomized(model)
    seen = _look(random, example)
    if problem := _problem(random, example, edits, seen, _appended(random, example, seen)):
        raise EditError(f"These blocks cannot be removed: without them {problem}.")


def appended(model: nn.Module, example: Example) -> Appended:
    """Find the blocks that append channels to what they read, and where these channels go.

    Args:
        model: not touched.
        example: the inputs of one forward call.
    """
    random = randomized(model)
    return _appended(random, example, _look(random, example))


def without(model: nn.Module, edits: Sequence[Remove], channels: Appended) -> list[Edit]:
    """Return the edits that take blocks out of a network, those first that others need for it.

    All that reads what a block appends loses these channels.

    Args:
        model: as it is before; not touched.
        edits: the blocks.
        channels: see `appended`.
    """
    groups = [group for edit in edits for group in channels.get(edit.layer, ())]
    cuts = edits_of(model, groups, {group.name: range(len(group.units)) for group in groups})
    gone = [edit.layer for edit in edits]
    return [*(cut for cut in cuts if not any(_within(cut.layer, g) for g in gone)), *edits]


def branch_ends(model: nn.Module, example: Example, edits: Sequence[Remove]) -> list[str]:
    """Name for each block the layer that its branch ends with, before the sum; a layer for itself.

    Raises:
        EditError: a block has no such layer.
    """
    seen = _look(model, example)
    return [
        edit.layer
        if isinstance(model.get_submodule(edit.layer), WEIGHTED)
        else _end(model, edit, seen)
        for edit in edits
    ]


def close_branch(model: nn.Module, example: Example, edit: Remove) -> None:
    """Let the branch of a block end in zeros, or a single layer pass what comes, in place.

    So a network computes what it will without the block, while the block can still be put back.

    Raises:
        EditError: the block has no layer that its branch could end with.
    """
    _close(model, edit, _look(model, example))


# ---------------------------------------------------------------- what one forward pass shows


@dataclass
class _Call:
    """The tensor that a module read and the one that it gave."""

    given: Any
    output: Any


def _look(model: nn.Module, example: Example) -> dict[str, list[_Call]]:
    """What each module did, in the order in which they ended."""
    seen: dict[str, list[_Call]] = {}

    def see(name: str, given: Any, output: Any) -> None:
        seen.setdefault(name, []).append(_Call(given, output))

    names = [name for name, _ in model.named_modules() if name]
    one = first_sample(example, model)  # asked beforehand: asking calls the model too
    with capture(model, names, see):
        call(model, one)
    return seen


def _may_leave(module: nn.Module) -> bool:
    if isinstance(module, WEIGHTED):
        return True
    inside = any(isinstance(part, WEIGHTED) for part in module.modules())
    return inside and not isinstance(module, _CONTAINERS)


def _candidates(
    model: nn.Module, name: str, seen: dict[str, list[_Call]]
) -> tuple[list[Remove], str]:
    """What may be left of a block, the least first; or why it must stay."""
    calls = seen.get(name, [])
    if len(calls) != 1:
        return [], "called more than once" if calls else UNCALLED
    given, output = calls[0].given, calls[0].output
    if not isinstance(given, Tensor) or not isinstance(output, Tensor):
        return [], "it does not make one tensor of one"
    module = model.get_submodule(name)
    found = [Remove(name)] if given.shape == output.shape else []
    if isinstance(module, WEIGHTED):
        return found, "" if found else "it changes shapes"
    found += [Remove(name, relu=True)] if found else []
    for child in sorted(dict(module.named_children()), key=lambda name: _size(module, name)):
        inner = seen.get(f"{name}.{child}", [])
        gives = inner[0].output if len(inner) == 1 and inner[0].given is given else None
        if isinstance(gives, Tensor) and gives.shape == output.shape:
            found += [Remove(name, child), Remove(name, child, relu=True)]
    return found, "" if found else "it changes shapes, and no child of it does the same"


def _size(module: nn.Module, child: str) -> int:
    """Numbers in a child: of two ways through a block the shortcut is the smaller one."""
    return sum(parameter.numel() for parameter in module.get_submodule(child).parameters())


def _appended(
    model: nn.Module, example: Example, seen: dict[str, list[_Call]]
) -> dict[str, list[Group]]:
    blocks = [name for name, module in model.named_modules() if name and _may_leave(module)]
    more = {name: count for name in blocks if (count := _more(seen.get(name, [])))}
    groups = trace(model, example)[0] if more else []
    found = {name: [group for group in groups if _leads_out(group, name)] for name in more}
    return {name: own for name, own in found.items() if _makes(own) == more[name]}


def _more(calls: list[_Call]) -> int:
    """How many channels a block gives beside those it reads; 0 if it passes not all of them."""
    given, output = (calls[0].given, calls[0].output) if len(calls) == 1 else (None, None)
    if not isinstance(given, Tensor) or not isinstance(output, Tensor) or given.dim() < 2:
        return 0
    if given.shape[:1] + given.shape[2:] != output.shape[:1] + output.shape[2:]:
        return 0
    size = given.shape[1]
    passed = any(torch.equal(part, given) for part in (output[:, :size], output[:, -size:]))
    return output.shape[1] - size if passed else 0


def _leads_out(group: Group, block: str) -> bool:
    """Whether channels are made in a block and nowhere else, and read behind it."""
    inside = [_within(layer, block) for layer, _ in group.slots]
    makers = all(_within(layer, block) for layer, _ in group.makers)
    return makers and any(inside) and not all(inside)


def _makes(groups: Sequence[Group]) -> int:
    """How many channels there are in some groups, all those of a unit counted."""
    return sum(
        len(unit[group.slots.index(group.makers[0])]) for group in groups for unit in group.units
    )


def _within(name: str, block: str) -> bool:
    return name == block or name.startswith(f"{block}.")


# ---------------------------------------------------------------- proof


def _problem(
    random: nn.Module,
    example: Example,
    edits: Sequence[Remove],
    seen: dict[str, list[_Call]],
    channels: Appended,
) -> str:
    """Say what goes wrong in a network without some blocks, or nothing."""
    whole = twin(random)
    leaving = without(random, edits, channels)
    try:
        for edit in edits:
            if edit.layer not in channels:
                _close(whole, edit, seen)
    except EditError as error:
        return str(error)
    ignore(whole, [edit for edit in leaving if isinstance(edit, Prune)])
    return differs(whole, example, random, leaving)


@torch.no_grad()
def _close(model: nn.Module, edit: Remove, seen: dict[str, list[_Call]]) -> None:
    module: Any = model.get_submodule(edit.layer)
    if isinstance(module, nn.Linear):
        nn.init.eye_(module.weight)
    elif isinstance(module, WEIGHTED):
        nn.init.dirac_(module.weight, getattr(module, "groups", 1))
    else:
        module = model.get_submodule(_end(model, edit, seen))
        if module.weight is None:
            raise EditError("its branch ends with a batch norm without a scale")
        nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _end(model: nn.Module, edit: Remove, seen: dict[str, list[_Call]]) -> str:
    """The layer that the branch of a block ends with: the last to be called, the shortcut aside."""
    stays = f"{edit.layer}.{edit.shortcut}" if edit.shortcut else None
    ends = [
        name
        for name in seen
        if name.startswith(f"{edit.layer}.")
        and not (stays and f"{name}.".startswith(f"{stays}."))
        and isinstance(model.get_submodule(name), _ENDS)
    ]
    if not ends:
        raise EditError("it has no layer that its branch ends with")
    return ends[-1]
