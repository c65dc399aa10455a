"""Takes tensors out of what a model gives: the class scores, or all there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pliant.errors import ModelError

KEPT = ("past_key_values", "cache_params", "mems", "past_buckets_states")
"""Names under which networks give what they keep for their next call."""


def logits(output: Any) -> Tensor:
    """Take the class scores out of what a model gives.

    Raises:
        ModelError: there are none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise ModelError(
        f"The model must give a tensor or something with logits, not {type(output).__name__}; "
        "wrap it, or train it with your own loop."
    )


def answers(output: Any) -> list[Tensor]:
    """Take all tensors of floating point out of what a model gives, however deep they lie.

    They are looked for in mappings, sequences, dataclasses, and the attributes of anything else,
    ``logits`` among them if it is a property. Keys and values that a network keeps for its next
    call are no answers.

    Raises:
        ModelError: there are none, so that nothing can be compared.
    """
    found = [t for t in _held(output, set()) if t.is_floating_point() and t.numel()]
    if not found:
        raise ModelError(
            "The network must return at least one tensor of floating-point numbers, so that it can "
            f"be compared before and after; its {type(output).__name__} holds none: wrap the "
            "network so that it returns one."
        )
    return found


def wide_answers(output: Any) -> list[Tensor]:
    """Take the answers without single numbers, such as a loss beside them: those have no spread.

    Where there is nothing else, they are the answers.

    Raises:
        ModelError: as for `answers`.
    """
    found = answers(output)
    return [tensor for tensor in found if tensor.dim()] or found


def without_caches(output: Any) -> Any:
    """Return an output without what a network keeps for its next call; itself, if it has none."""
    if isinstance(output, Mapping):
        left = {k: v for k, v in output.items() if k not in KEPT and not _is_cache(v)}
        return left if len(left) < len(output) else output
    if type(output) is tuple:
        some = tuple(part for part in output if not _is_cache(part))
        return some if len(some) < len(output) else output
    return output


def _is_cache(value: Any) -> bool:
    return "Cache" in type(value).__name__


def alike(wanted: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> bool:
    """Say whether tensors are the same, but for a share of the largest number of each."""
    return len(wanted) == len(found) and all(
        _close(one, other, tolerance) for one, other in zip(wanted, found, strict=True)
    )


def _held(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not _is_no_answer(value):
        seen.add(id(value))
        for part in _parts(value):
            yield from _held(part, seen)


def _is_no_answer(value: Any) -> bool:
    return isinstance(value, str | bytes | type | nn.Module) or _is_cache(value)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [part for key, part in value.items() if key not in KEPT]
    if isinstance(value, Sequence):
        return list(value)
    known = [field.name for field in fields(value)] if is_dataclass(value) else []
    names = known or getattr(value, "__dict__", {})
    names = [name for name in (*names, "logits") if name not in KEPT]
    return [getattr(value, name, None) for name in dict.fromkeys(names)]


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Compare two tensors; where there is no finite number, there is nothing to compare."""
    finite = one[one.isfinite()]
    if one.shape != other.shape or one.dtype != other.dtype or not finite.numel():
        return False
    return torch.allclose(one, other, rtol=0, atol=tolerance * float(finite.abs().max()))
