"""The checks of methods that recover, cluster or analyze: small problems, and bad ones."""

from __future__ import annotations

import json
import math
import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pliant.api import analyze, cluster, recover
from pliant.errors import DataError, ModelError, PliantError
from pliant.registry import Verb, entry_of, plain
from pliant.result import Finding, Solution
from pliant.testing import described
from pliant.testing.described import must
from pliant.testing.toys import Toy
from pliant.testing.trial import once, put_in

Check = tuple[str, Callable[[], None]]
VERBS: dict[Verb, Callable[..., Any]] = {
    "recover": recover,
    "cluster": cluster,
    "analyze": analyze,
}
NAMES = {"recover": "recovered", "cluster": "labels"}  # of what was asked for


@dataclass(frozen=True, eq=False)
class Problem:
    """What a verb is called with, before the method.

    Args:
        name: what it stands for.
        verb: the call.
        make: makes the two arguments anew, equal ones every time.
    """

    name: str
    verb: Verb
    make: Callable[[], tuple[Any, Any]]

    def solve(self, method: Any, seed: int = 0) -> Any:
        """Call the verb."""
        return VERBS[self.verb](*self.make(), method, seed=seed)


@once
def shared_solved(method: Any, problem: Problem) -> Any:
    """What a call gives; to be read only."""
    return problem.solve(method)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _planted() -> Tensor:
    """A tensor (12, 10, 4) whose slices have rank 2."""
    return torch.einsum("irk,rjk->ijk", _noise(12, 2, 4), _noise(2, 10, 4))


def _missing() -> tuple[Any, Any]:
    known = _noise(12, 10, 4) < 0.7
    return torch.where(known, _planted(), math.nan), known


def _wrong() -> tuple[Any, Any]:
    return _planted() + 3.0 * (_noise(12, 10, 4) > 1.6), None


def _groups(*shape: int) -> Tensor:
    """Samples (24, *shape) around three centres."""
    return 3.0 * _noise(3, *shape).repeat_interleave(8, 0) + 0.3 * _noise(24, *shape)


def _sets() -> list[Tensor]:
    return [part[:, : 4 + row % 3] for row, part in enumerate(_groups(9, 6))]


PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        Problem("missing_entries", "recover", _missing),
        Problem("wrong_entries", "recover", _wrong),
        Problem("vectors", "cluster", lambda: (_groups(9), 3)),
        Problem("sets", "cluster", lambda: (_sets(), 3)),
        Problem("views", "cluster", lambda: ([_groups(9, 4), _groups(7, 5)], 3)),
    )
}
"""Small problems by name, for methods that recover or cluster."""


@cache
def problems(verb: Verb, toys: tuple[Toy, ...]) -> tuple[Problem, ...]:
    """Return the problems of a verb; `analyze` gets the toys."""
    if verb == "analyze":
        return tuple(Problem(toy.name, verb, partial(_shown, toy)) for toy in toys)
    return tuple(problem for problem in PROBLEMS.values() if problem.verb == verb)


def _shown(toy: Toy) -> tuple[Any, Any]:
    return toy.model(), toy.data()


def verb_of(method: Any) -> Verb:
    """Say what a method does, also one that is not registered."""
    found = [verb for verb in VERBS if callable(getattr(method, verb, None))]
    must(len(found) == 1, f"{type(method).__name__} must have one method of {', '.join(VERBS)}")
    return found[0]


def checks(
    method: Any, toys: tuple[Toy, ...], refuses: Mapping[str, str] | None
) -> Iterator[Check]:
    """Yield the checks of a method that recovers, clusters or analyzes.

    Args:
        method: of one of these verbs.
        toys: networks to analyze.
        refuses: what it must refuse, and how: see `check_method`. Without it a problem may be
            refused by a DataError or a ModelError.
    """
    every = problems(verb_of(method), toys)
    kept = [problem for problem in every if problem.name not in (refuses or {})]
    for problem in every:
        if problem not in kept:
            sentence = (refuses or {})[problem.name]
            yield f"refuses_{problem.name}", partial(_refuses, method, problem, sentence)
    for problem in kept:
        check = solves if refuses is not None else _solves_or_refuses
        yield f"solves_{problem.name}", partial(check, method, problem)
    alone = model_is_left_alone_after_an_error if every[0].verb == "analyze" else arrays_give_arrays
    named = [odd_values_work_or_are_refused] if entry_of(method) is not None else []
    for check in (
        same_seed_same_bytes,
        input_stays_untouched,
        random_states_stay_untouched,
        bad_input_is_refused,
        *named,
        alone,
    ):
        yield check.__name__, partial(_on_the_first, check, method, kept)


def works(method: Any, toys: tuple[Toy, ...], refuses: Mapping[str, str] | None) -> None:
    """The short form of all checks, for variants."""
    every = problems(verb_of(method), toys)
    _on_the_first(solves, method, [one for one in every if one.name not in (refuses or {})])


def _on_the_first(
    check: Callable[[Any, Problem], None], method: Any, kept: Sequence[Problem]
) -> None:
    """One check, on the first problem that is not refused."""
    said = ""
    for problem in kept:
        try:
            shared_solved(method, problem)
        except (DataError, ModelError) as error:
            said = said or str(error)
        else:
            check(method, problem)
            return
    raise AssertionError(f"it refuses every problem that it is given, with {said!r}")


def _solves_or_refuses(method: Any, problem: Problem) -> None:
    try:
        shared_solved(method, problem)
    except (DataError, ModelError) as error:
        must(str(error).endswith("."), f"the refusal {str(error)!r} must be a sentence")
    else:
        solves(method, problem)


def solves(method: Any, problem: Problem) -> None:
    """The result is whole: of the right kind and shape, finite, its rows plain data."""
    found, (x, second) = shared_solved(method, problem), problem.make()
    kind = Finding if problem.verb == "analyze" else Solution
    must(isinstance(found, kind), f"{kind.__name__} was wanted, {type(found).__name__} came")
    must(json.loads(json.dumps(found.plain())), "the result must be plain data beside its tensors")
    for name, value in found.values.items():
        must(bool(torch.isfinite(torch.as_tensor(value)).all()), f"{name} is not finite")
    if isinstance(found, Finding):
        must(found.text.endswith("."), f"the text {found.text!r} must be a sentence")
        return
    must(next(iter(found.values)) == NAMES[problem.verb], f"{NAMES[problem.verb]} comes first")
    must(found.history and found.iterations > 0, "the history must show the iterations")
    if problem.verb == "recover":
        must(found.value.shape == x.shape, f"{x.shape} was wanted, {found.value.shape} came")
        must(found.value.dtype == x.dtype, f"{x.dtype} was wanted, {found.value.dtype} came")
    else:
        must(found.value.shape == (24,), f"24 labels were wanted, {found.value.shape} came")
        must(set(found.value.tolist()) <= set(range(second)), "labels are 0 to groups - 1")


def same_seed_same_bytes(method: Any, problem: Problem) -> None:
    """The caller's random state has no part in the result."""
    first = _bytes(shared_solved(method, problem))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(987)
        second = _bytes(problem.solve(method))
    must(first == second, "two calls with one seed gave different bytes")


def _bytes(found: Any) -> tuple[Any, ...]:
    values = {name: np.asarray(value).tobytes() for name, value in found.values.items()}
    return values, json.dumps({**found.plain(), "seconds": 0})


def input_stays_untouched(method: Any, problem: Problem) -> None:
    """What came is as it was, a network with its flags and hooks."""
    x, second = problem.make()
    VERBS[problem.verb](x, second, method)
    _same(x, problem.make()[0])
    if isinstance(second, Tensor):
        _same(second, problem.make()[1])


def _same(now: Any, before: Any) -> None:
    if isinstance(now, nn.Module):
        pairs = zip(now.state_dict().items(), before.state_dict().values(), strict=True)
        changed = [name for (name, a), b in pairs if not torch.equal(a, b)]
        must(not changed, f"the model changed in {', '.join(changed[:3])}")
        flags = [m.training for m in before.modules()]
        must([m.training for m in now.modules()] == flags, "the model is in another mode")
        must(not put_in(now), f"in the model was left: {'; '.join(put_in(now))}")
        must(all(p.grad is None for p in now.parameters()), "gradients were left in the model")
    elif isinstance(now, list):
        for one, other in zip(now, before, strict=True):
            _same(one, other)
    else:
        must(torch.equal(now.nan_to_num(), before.nan_to_num()), "the given tensor was changed")


def random_states_stay_untouched(method: Any, problem: Problem) -> None:
    """The caller's random states are as before: of torch, numpy and Python."""
    before = _states()
    problem.solve(method)
    must(_states() == before, "it drew from a global random state instead of the generator")


def _states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), pickle.dumps(np.random.get_state()), random.getstate()


def bad_input_is_refused(method: Any, problem: Problem) -> None:
    """NaN, infinity, nothing at all, wrong shapes: each is refused in a sentence."""
    x, second = problem.make()
    for what, given in _bad(problem.verb, x, second).items():
        try:
            VERBS[problem.verb](*given, method)
        except PliantError as error:
            must(str(error).endswith("."), f"the refusal {str(error)!r} must be a sentence")
        else:
            raise AssertionError(f"{what} was not refused")


def _bad(verb: Verb, x: Any, second: Any) -> dict[str, tuple[Any, Any]]:
    if verb == "analyze":
        inputs = second.example(4)[0]
        return {
            "inputs with NaN": (x, inputs * math.nan),
            "no inputs": (x, inputs[:0]),
            "a model that fails in forward": (x, inputs[:, :0]),
            "no model": (None, inputs),
            "data of no kind": (x, 3),
        }
    if verb == "cluster":
        return {
            "x with NaN": (torch.full_like(x, math.nan), second),
            "x with infinity": (torch.full_like(x, math.inf), second),
            "an empty x": (x[:0], second),
            "views of different samples": ([x, x[1:]], second),
            "no group": (x, 0),
            "more groups than samples": (x, len(x) + 1),
        }
    known = torch.ones(x.shape, dtype=torch.bool)
    whole = x.nan_to_num()
    return {
        "x with NaN": (torch.full_like(x, math.nan), known),
        "x with infinity": (torch.full_like(x, math.inf), None),
        "an empty x": (whole[:0], None),
        "a mask of another shape": (whole, known[..., :1]),
        "a mask that knows nothing": (whole, ~known),
        "text": ("photograph", None),
    }


def odd_values_work_or_are_refused(method: Any, problem: Problem) -> None:
    """Options at the ends of their ranges, or zero, negative and huge: refused or whole."""
    options, wrong = plain(method)["options"], []
    for option, value in described.odd_values(method):
        try:
            solves(type(method)(**{**options, option: value}), problem)
        except PliantError:
            continue
        except Exception as error:
            wrong.append(f"{option}={value!r} ends in {type(error).__name__}: {error}")
    must(not wrong, f"{'; '.join(wrong)}: refuse the value")


def model_is_left_alone_after_an_error(method: Any, problem: Problem) -> None:
    """A network that fails in its second forward is left as it was."""
    model, data = problem.make()
    layer = list(model.modules())[-1]
    forward, calls = layer.forward, [0]

    def raising(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise RuntimeError("out of memory")
        return forward(*given, **named)

    layer.forward = raising
    try:
        analyze(model, data, method)
    except Exception:  # which one is the method's affair
        pass
    finally:
        del layer.forward
    _same(model, problem.make()[0])


def arrays_give_arrays(method: Any, problem: Problem) -> None:
    """The same numbers as arrays give the same result as arrays."""
    x, second = problem.make()
    second = second.numpy() if isinstance(second, Tensor) else second
    found = VERBS[problem.verb](x.numpy(), second, method)
    expected = shared_solved(method, problem)
    must(all(isinstance(v, np.ndarray) for v in found.values.values()), "a tensor came back")
    same = np.array_equal(found.value, expected.value.numpy())
    must(same, "arrays gave other values than tensors")


def _refuses(method: Any, problem: Problem, sentence: str) -> None:
    try:
        problem.solve(method)
    except PliantError as error:
        must(sentence in str(error), f"it refuses with {str(error)!r}, not with {sentence!r}")
    else:
        raise AssertionError(f"it was to refuse {problem.name} ({sentence}), but works")
