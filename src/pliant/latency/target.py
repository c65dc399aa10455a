"""Where a network is to run: the runtime, its threads, the batch, the precision."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.cost import Example, twin
from pliant.errors import MethodError, ModelError
from pliant.latency.runtimes import BUILT_IN, Sampler, batched, copies_of, on_cpu, samplers

Function = Callable[[nn.Module, Example], float]

DTYPES = ("float32", "bfloat16", "float16")
SECONDS = 2.0  # that a comparison may take, about
ASIDE = ("function", "seconds")  # no setting of what is measured
_WORDS = ("threads", "batch", "dtype", "device", "seconds")


@dataclass(frozen=True)
class Target:
    """A runtime with its settings, on which networks and layers are measured.

    Args:
        runtime: ``onnxruntime``, ``torch`` (eager, channels_last), ``compile`` (torch.compile), or
            the name of a function of your own (see `Target.of`).
        threads: of one inference; as many as PyTorch uses now if not given.
        batch: samples of one inference.
        dtype: of weights and inputs; other than float32 only in PyTorch.
        device: ``cpu``, or ``cuda`` in PyTorch, where events time the work.
        seconds: that comparing two networks may take, about; allow more, such as 20, on a machine
            that is slow for a while and then fast again.
        function: measures instead of a runtime.

    Raises:
        MethodError: a setting is unknown or does not go with the runtime.

    >>> str(Target("torch", threads=2, batch=16))
    'torch, 2 threads, batch 16'
    """

    runtime: str = "onnxruntime"
    threads: int = field(default_factory=torch.get_num_threads)
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    seconds: float = SECONDS
    function: Function | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.function is not None:
            _check_function(self.function)
        elif self.runtime not in BUILT_IN:
            raise MethodError(
                f"A target is one of {', '.join(BUILT_IN)}, not {self.runtime!r}; Target.of makes "
                "one of a function of your own."
            )
        for name in ("threads", "batch"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise MethodError(f"The {name} of a target must be at least 1, not {value!r}.")
        if not isinstance(self.seconds, int | float) or not 0 < self.seconds < math.inf:
            raise MethodError(
                f"The seconds of a target must be a number above 0, not {self.seconds!r}."
            )
        if self.dtype not in DTYPES:
            raise MethodError(
                f"The dtype of a target is one of {', '.join(DTYPES)}, not {self.dtype!r}."
            )
        if self.runtime == "onnxruntime" and (self.dtype, self.device) != ("float32", "cpu"):
            raise MethodError(
                "The target onnxruntime measures float32 on the CPU here: take torch or compile "
                f"for {self.dtype} on {self.device}."
            )

    @classmethod
    def of(cls, function: Function, name: str = "", *, batch: int = 1) -> Target:
        """Make a target of a function that measures: a phone, a board, a simulator.

        Args:
            function: called with a module and its example inputs; returns the seconds of one
                forward pass. It is given whole networks and single layers, all on the CPU.
                For one time it is called four times, to compare two networks nine times with
                each; the first call warms up.
            name: what reports call it; times of a named one are kept on disk.
            batch: samples in the example inputs.

        Raises:
            MethodError: it is no such function.
        """
        _check_function(function)
        return cls(name, threads=1, batch=batch, function=function)

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``"onnxruntime"`` or ``"torch,threads=2,batch=16"``.

        Raises:
            MethodError: the text is no target.
        """
        runtime, *rest = (part.strip() for part in text.split(","))
        values: dict[str, Any] = {}
        for item in filter(None, rest):
            name, _, value = (part.strip() for part in item.partition("="))
            if name not in _WORDS or not value or name in values:
                raise MethodError(
                    f"Cannot read {item!r} of the target {text!r}: write a runtime and then any "
                    f"of {', '.join(_WORDS)}, such as torch,threads=2,batch=16."
                )
            values[name] = _number(value)
        return cls(runtime or "onnxruntime", **values)

    def __str__(self) -> str:
        if self.function is not None:
            return f"{self.runtime or 'own function'}, batch {self.batch}"
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        more = [self.dtype] * (self.dtype != "float32") + [self.device] * (self.device != "cpu")
        return ", ".join([self.runtime, threads, f"batch {self.batch}", *more])

    def plain(self) -> dict[str, Any]:
        """Return the settings that a time depends on, as plain data."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ASIDE}

    @property
    def once(self) -> bool:
        """Whether one measurement is costly and not repeated often: functions of the user's."""
        return self.function is not None

    def sampler(self, model: nn.Module, example: Example | Tensor) -> Sampler:
        """Make what gives the seconds of one inference each time it is called, warmed up.

        Args:
            model: measured as it is now, in eval mode, on a copy.
            example: inputs of one forward call; rows are repeated up to the target's batch.
        """
        return self.samplers(model, example)[0]

    def samplers(
        self, model: nn.Module, example: Example | Tensor, builds: int = 1
    ) -> list[Sampler]:
        """Make samplers of so many builds of a network, or of one where they would not differ.

        Args:
            model: measured as it is now, in eval mode, on copies.
            example: inputs of one forward call; rows are repeated up to the target's batch.
            builds: how often a network that takes less than a millisecond is built.
        """
        inputs = batched(example, self.batch)
        if self.function is not None:
            return [self._own(model, inputs)]
        return samplers([model], inputs, self, builds)

    def layer_sampler(self, layer: nn.Module, example: Example) -> Sampler:
        """Make a sampler of one layer as it runs within a network.

        Several copies with weights of their own run in a row: what one call of a runtime costs
        by itself vanishes, and large weights come from memory as they do in a network.
        """
        if self.function is not None:
            return self._own(layer, example)
        return samplers(copies_of(layer), example, self)[0]

    def fingerprint(self) -> dict[str, Any]:
        """Return all that a time depends on beside the layer: settings, machine, versions."""
        card = {"card": _card(self.device)} if self.device.startswith("cuda") else {}
        libraries = ("torch", "onnxruntime") if self.runtime == "onnxruntime" else ("torch",)
        return {
            **self.plain(),
            "machine": machine(),
            **card,
            "cores": os.cpu_count() or 1,
            **{name: _version(name) for name in libraries},
        }

    def digest(self) -> str:
        """Return a short name for the fingerprint."""
        text = json.dumps(self.fingerprint(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _own(self, model: nn.Module, inputs: Example) -> Sampler:
        assert self.function is not None
        function, network, given = self.function, twin(model).cpu().eval(), on_cpu(inputs)
        return lambda: _seconds(function(network, given))


Where = Target | str | Function
"""What names a target; text is read by `Target.parse`."""


def as_target(given: Where) -> Target:
    """Make a target of what names one: itself, text, or a function.

    Raises:
        MethodError: it names none.
    """
    if isinstance(given, Target):
        return given
    return Target.parse(given) if isinstance(given, str) else Target.of(given)


def _check_function(function: Any) -> None:
    """Refuse what cannot be called with a module and its example inputs."""
    try:
        inspect.signature(function).bind(None, ())
    except ValueError:  # of a function in C nothing is known
        return
    except TypeError as error:
        raise MethodError(
            "A target is a Target, text such as 'torch,threads=2', or a function that takes a "
            f"module and its example inputs and returns seconds, not {function!r}: name one."
        ) from error


def _seconds(found: Any) -> float:
    """Take what a user's function returned."""
    try:
        seconds = float(found)
    except (TypeError, ValueError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ModelError(
            f"A target's function must return seconds, not {found!r}: check what it measures."
        )
    return seconds


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def machine() -> str:
    """Name the processor."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if "model name" in line:
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _card(device: str) -> str:
    """Name a graphics card; empty where there is none, as when a run is resumed elsewhere."""
    try:
        return torch.cuda.get_device_name(device)
    except (AssertionError, RuntimeError):
        return ""


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
