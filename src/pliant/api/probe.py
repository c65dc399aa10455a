"""`analyze` and `compare`: show networks to a probe, and leave them as they were."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pliant.api.solve import randomness
from pliant.cost import device_of
from pliant.data import Data, unpack
from pliant.data.asking import in_memory
from pliant.drivers.devices import own_randomness
from pliant.drivers.score import evaluate
from pliant.errors import DataError, ModelError
from pliant.families.analyze.inputs import shown as split_of
from pliant.observe.finite import check_weights, in_words
from pliant.registry import of_verb, plain
from pliant.result import Finding

BATCH = 256  # inputs of one forward call, where they came as one tensor


def analyze(model: nn.Module, data: Any, method: Any, *, seed: int = 0) -> Finding:
    """Find something out about a network; the network stays as it is.

    Args:
        model: any network, on the device where it is.
        data: inputs as one tensor or array, a pair (inputs, labels), a DataLoader, a data set,
            or a `Data`. What is no `Data` becomes its test split; labels are read only by
            methods that say so.
        method: a name, a spec string, or an instance.
        seed: of everything random; the caller's random state stays untouched.

    Returns:
        The finding: values, rows, and one sentence.

    Raises:
        MethodError: the method is unknown or does not analyze.
        DataError: there are no data, or they are not finite.
        ModelError: the model is none, fails in forward, has a weight that is not finite, or is
            not what the method can look at.
    """
    probe = of_verb(method, "analyze")
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"The model must be a torch.nn.Module, not {type(model).__name__}; "
            "pliant.zoo.build makes one from a name."
        )
    shown = _shown(data).read_by(model)
    shown.check()
    check_weights(model)
    began = time.monotonic()
    with own_randomness(seed, device_of(model)), in_words(type(probe).__name__):
        found = probe.analyze(model, shown, randomness(seed))
    seconds = round(time.monotonic() - began, 4)
    return replace(found, seconds=seconds, seed=seed, method=plain(probe))


def compare(
    models: Mapping[str, nn.Module],
    data: Any,
    method: Any = "output_sensitivity",
    *,
    seed: int = 0,
) -> Finding:
    """Look at several networks in the same way, with the same draws, and list them in order.

    Rows hold the main value and the other numbers found for each network, the lowest main value
    first; where the data have labels, mean loss and accuracy of the split looked at, and the loss
    of the training split, without whose equality many findings cannot be compared.

    Args:
        models: networks by name; they stay as they are.
        data: as for `analyze`.
        method: a name, a spec string, or an instance.
        seed: of everything random, the same for each network.

    Returns:
        A finding whose values are the main values by name, the lowest first.

    Raises:
        ModelError: there are no networks, or as for `analyze`.
        DataError: as for `analyze`; a loader that can be read only once.
        MethodError: as for `analyze`.
    """
    if not models:
        raise ModelError("There must be networks to compare, a mapping from names, but none came.")
    given = _shown(data)
    began = time.monotonic()
    found = {name: analyze(model, given, method, seed=seed) for name, model in models.items()}
    order = sorted(found, key=lambda name: float(found[name].value))
    rows = [
        {"network": name, **_numbers(found[name]), **_scores(models[name], given)} for name in order
    ]
    first, last = found[order[0]], found[order[-1]]
    what = next(iter(first.values)).replace("_", " ")
    text = (
        f"{order[0]} has the lowest {what} of {len(order)} networks, {float(first.value):.4g}, and "
        f"{order[-1]} the highest, {float(last.value):.4g}."
    )
    values = {name: float(found[name].value) for name in order}
    seconds = round(time.monotonic() - began, 4)
    return Finding(values, tuple(rows), text, seconds=seconds, seed=seed, method=first.method)


def _numbers(found: Finding) -> dict[str, Any]:
    return {name: v for name, v in found.values.items() if isinstance(v, int | float)}


def _scores(model: nn.Module, data: Data) -> dict[str, float]:
    """Loss and accuracy of the split looked at, and the training loss; nothing without labels."""
    split = split_of(data)
    _, labels = unpack(next(iter(data.batches(split, 1))))
    if not isinstance(labels, Tensor):
        return {}
    score = evaluate(model, data, split)
    found = {"loss": score.loss, "accuracy": score.accuracy}
    if data.has("train") and split != "train":
        found["train_loss"] = evaluate(model, data, "train").loss
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _shown(data: Any) -> Data:
    """Make a `Data` of what users have; alone, it is the test split."""
    if isinstance(data, Data):
        return data
    if isinstance(data, list | tuple) and len(data) == 2 and all(map(_is_array, data)):
        return Data(test=tuple(map(_tensor, data)))
    if _is_array(data):
        inputs = _tensor(data)
        if not inputs.dim() or not len(inputs) or not torch.isfinite(inputs).all():
            raise DataError(
                f"Inputs must be finite and at least one, but a tensor of shape "
                f"{tuple(inputs.shape)} came that is empty or holds NaN or infinity."
            )
        return Data(test=[(part,) for part in inputs.split(BATCH)])
    if in_memory(data) is not None:
        return Data(test=data)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        return Data(test=data)
    raise DataError(
        "Data must be inputs, a pair (inputs, labels), a DataLoader, a data set or a Data, not "
        f"{type(data).__name__}; pliant.data.load makes one from a name or a folder."
    )


def _is_array(part: Any) -> bool:
    return isinstance(part, Tensor | np.ndarray)


def _tensor(part: Any) -> Tensor:
    """Arrays become tensors; their doubles become floats, as models expect."""
    if isinstance(part, Tensor):
        return part
    tensor = torch.as_tensor(part)
    return tensor.float() if tensor.dtype == torch.float64 else tensor
