"""`recover` and `cluster`: refuse what cannot be solved, solve, and say how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pliant.data.chance import generator, key_of
from pliant.drivers.devices import own_randomness
from pliant.errors import DataError, MethodError
from pliant.observe.finite import in_words
from pliant.registry import of_verb, plain
from pliant.result import Solution, Views


def recover(x: Any, known: Any, method: Any, *, seed: int = 0) -> Solution:
    """Recover a tensor of which entries are missing, or of which some are grossly wrong.

    Args:
        x: a tensor or an array of numbers; what is not known may hold anything, NaN too.
        known: what of x is known, a mask of its shape; None says that every entry is there but
            some are wrong, and nobody knows which.
        method: a name, a spec such as ``"nonconvex_tsvd(penalty='mcp')"``, or an instance.
        seed: of everything random; the caller's random state stays untouched.

    Returns:
        The solution; its value, named ``recovered``, has the shape of x. Arrays come back as
        arrays, in the precision of x; whole numbers come back as float64.

    Raises:
        DataError: x is empty, not finite where it is known, or the mask does not fit.
        MethodError: the method is unknown, does not recover, or its values are not finite.
    """
    solver = of_verb(method, "recover")
    numbers = _numbers(x, "x")
    mask = None if known is None else _mask(known, numbers)
    if mask is not None:
        numbers = torch.where(mask, numbers, 0)
    _check_finite(numbers, "x")
    return _solve(solver, lambda draw: solver.recover(numbers, mask, draw), x, numbers, seed)


def cluster(x: Any, groups: int, method: Any, *, seed: int = 0) -> Solution:
    """Divide samples into groups.

    Args:
        x: samples of one view: (samples, features), or (samples, features, columns) where each
            sample is a set of column vectors, or a list of such sets (features, columns) with
            different numbers of columns. A list of the last two: views of the same samples.
        groups: how many there are.
        method: a name, a spec string, or an instance.
        seed: of everything random; the caller's random state stays untouched.

    Returns:
        The solution; its value, named ``labels``, holds a whole number below `groups` for each
        sample. Arrays come back as arrays.

    Raises:
        DataError: there are no samples, they are not finite, views differ in their number, or
            the groups are fewer than 1 or more than the samples.
        MethodError: the method is unknown, does not cluster, or its values are not finite.
    """
    solver = of_verb(method, "cluster")
    views = _views(x)
    samples = len(views[0])
    if isinstance(groups, bool) or not isinstance(groups, int) or not 1 <= groups <= samples:
        raise DataError(
            f"groups must be a whole number from 1 to the {samples} samples, not {groups!r}."
        )
    first = x
    while isinstance(first, list | tuple):
        first = first[0]
    return _solve(
        solver, lambda draw: solver.cluster(views, groups, draw), first, views[0][0], seed
    )


# ---------------------------------------------------------------- what comes in


def _numbers(x: Any, name: str) -> Tensor:
    """Read real numbers as a tensor of float32 or float64, a copy of its own."""
    try:
        found = x.detach() if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} must hold numbers, a tensor or an array, but {type(x).__name__} cannot be "
            f"read as one ({error})."
        ) from error
    if found.is_complex() or not found.numel() or not found.dim():
        raise DataError(
            f"{name} must hold real numbers and at least one of them, but its dtype is "
            f"{found.dtype} and its shape {tuple(found.shape)}."
        )
    short = found.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return found.to(torch.float32 if short else torch.float64, copy=True)


def _mask(known: Any, x: Tensor) -> Tensor:
    mask = _numbers(known, "known").to(x.device)
    if mask.shape != x.shape or not torch.isin(mask, torch.tensor([0, 1]).to(mask)).all():
        raise DataError(
            f"known must be a mask of the shape {tuple(x.shape)} of x, true where an entry is "
            f"known, but its shape is {tuple(mask.shape)} or it holds other values."
        )
    if not mask.any():
        raise DataError("known must be true somewhere, but no entry of x is known.")
    return mask.bool()


def _check_finite(x: Tensor, name: str) -> None:
    wrong = (~torch.isfinite(x)).nonzero()
    if len(wrong):
        raise DataError(
            f"{name} must be finite where it is known, but {len(wrong)} entries are not, the "
            f"first at {tuple(wrong[0].tolist())}; mark them as unknown or mend them."
        )


def _views(x: Any) -> Views:
    """Bring all forms of samples into views of matrices."""
    parts = list(x) if isinstance(x, list | tuple) else [x]
    if not parts:
        raise DataError("x must hold samples, but it is empty.")
    if parts[0] is not x and all(getattr(part, "ndim", 0) == 2 for part in parts):
        parts = [x]  # the sets of one view
    views = tuple(_view(part, number) for number, part in enumerate(parts))
    if len({len(view) for view in views}) > 1:
        raise DataError(
            f"Views must show the same samples, but they have {[len(v) for v in views]} of them."
        )
    return views


def _view(part: Any, number: int) -> tuple[Tensor, ...]:
    name = f"view {number} of x"
    sets = [_numbers(one, name) for one in part] if isinstance(part, list | tuple) else None
    if sets is None:
        samples = _numbers(part, name)
        sets = list(samples[..., None] if samples.dim() == 2 else samples)
    if any(one.dim() != 2 or one.shape[0] != sets[0].shape[0] for one in sets):
        raise DataError(
            f"{name} must be (samples, features), (samples, features, columns) or a list of "
            f"matrices (features, columns), but samples of shape "
            f"{sorted({tuple(one.shape) for one in sets})[:3]} came."
        )
    for row, one in enumerate(sets):
        _check_finite(one, f"sample {row} of {name}")
    return tuple(sets)


# ---------------------------------------------------------------- what goes out


def _solve(
    solver: Any, solve: Callable[[torch.Generator], Solution], given: Any, like: Tensor, seed: int
) -> Solution:
    began = time.monotonic()
    who = in_words(type(solver).__name__)
    with own_randomness(seed, like.device), torch.no_grad(), who:
        found = solve(randomness(seed))
    for name, value in found.values.items():
        if not torch.isfinite(value).all():
            raise MethodError(
                f"{type(solver).__name__} ended with {name} that is not finite: its options do "
                "not suit these data; begin with its defaults."
            )
    arrays = not isinstance(given, Tensor)
    values = {name: _given_back(value, like.dtype, arrays) for name, value in found.values.items()}
    seconds = round(time.monotonic() - began, 4)
    return replace(found, values=values, seconds=seconds, seed=seed, method=plain(solver))


def randomness(seed: int) -> torch.Generator:
    """Make the generator of a call: far from `torch.manual_seed(seed)`, which made many a network.

    Noise that is the stream of the weights it is to test would be no noise.
    """
    return generator(key_of(seed, 0, 1))


def _given_back(value: Tensor, dtype: torch.dtype, arrays: bool) -> Any:
    value = value.to(dtype) if value.is_floating_point() else value
    return value.cpu().numpy() if arrays else value
