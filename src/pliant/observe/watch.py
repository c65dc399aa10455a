"""Looks at what flows through layers, with hooks that always come off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pliant.cost import Example, call, counted, evaluating, tensors
from pliant.errors import ModelError


@contextmanager
def capture(
    model: nn.Module,
    layers: Iterable[str],
    see: Callable[[str, Tensor, Tensor], None],
    *,
    gradients: bool = False,
) -> Iterator[None]:
    """Call ``see(name, input, output)`` at every forward of the named layers, inside the block.

    The model is in eval mode meanwhile; hooks are removed and the training flags restored at the
    end, also after an exception. What is seen is what the layer itself reads and gives: hooks of
    the user's own have changed the input by then, and not yet the output.

    Args:
        model: any module.
        layers: names of submodules that read one tensor, however it is passed, and return one.
        see: gets the tensors as they are, part of the autograd graph if there is one; of several
            inputs the first, None where there is none.
        gradients: whether the block records gradients; the layers do even where the model
            switches them off around them, as for a frozen backbone.
    """

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            see(name, first_tensor(args, kwargs), output)

        return look

    layers = list(layers)
    handles = [
        model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True, prepend=True)
        for name in layers
    ]
    modules = [model.get_submodule(name) for name in layers]
    try:
        with evaluating(model), torch.set_grad_enabled(gradients), recording(modules):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recording(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Record gradients of layers, if the caller does, where the model switches them off."""
    wanted = torch.is_grad_enabled()
    handles = [layer.register_forward_pre_hook(record_gradients) for layer in layers if wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record_gradients(module: nn.Module, args: Any) -> None:
    """Switch gradients on, as a hook before a layer: who switched them off puts back what was.

    Raises:
        ModelError: the model runs in inference mode, where there are none.
    """
    if torch.is_inference_mode_enabled():
        raise ModelError(
            f"Gradients by what {type(module).__name__} reads are needed, but the model runs it in "
            "torch.inference_mode: use torch.no_grad in forward instead."
        )
    torch.set_grad_enabled(True)


def first_tensor(args: Any, kwargs: Any) -> Any:
    """Return the first tensor of a call, None where there is none."""
    return next(tensors((args, kwargs)), None)


def with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the first tensor of a call, whether it comes by place or by name."""
    for place, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:place], change(value), *args[place + 1 :]), kwargs
    name = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    return args, kwargs if name is None else {**kwargs, name: change(kwargs[name])}


def samples(example: Example) -> int:
    """Count the samples of a batch of inputs."""
    return counted(example)


def one_sample(example: Example, row: int) -> Any:
    """Return one sample of a batch of inputs: a row of every tensor with an axis."""

    def take(value: Any) -> Any:
        return value[row : row + 1] if isinstance(value, Tensor) and value.dim() else value

    return tree_map(take, dict(example) if isinstance(example, Mapping) else tuple(example))


class Stepped:
    """One forward pass that stops at every call of some layers, until it is asked to go on.

    The pass runs in a thread of its own, and only while `until` waits for it. So two networks can
    be walked side by side, and no more than one layer's output is held of each.

    Args:
        model: any module; in eval mode meanwhile, without gradients.
        layers: names of submodules that return one tensor.
        example: inputs of the call.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], example: Example) -> None:
        self._model, self._layers, self._example = model, list(layers), example
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._now: tuple[str, Tensor] | None = None
        self._error: BaseException | None = None
        self._ended = self._left = False
        self._early: dict[str, list[Tensor]] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Stepped:
        """Begin; nothing runs yet."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the pass where it is."""
        self._left = True
        self._go.release()
        self._thread.join()

    def until(self, layer: str) -> Tensor | None:
        """Return the next output of a layer; None if the pass ends without calling it again.

        Outputs of other layers that come before are kept until they are asked for.
        """
        while not self._early.get(layer):
            if self._ended:
                return None
            self._go.release()
            self._stopped.acquire()
            if self._error is not None:
                raise self._error
            if self._now is not None:
                name, output = self._now
                self._early.setdefault(name, []).append(output)
        return self._early[layer].pop(0)

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._left:
                with capture(self._model, self._layers, self._stop):
                    call(self._model, self._example)
        except _Left:
            pass
        except BaseException as error:  # handed to who waits
            self._error = error
        self._now, self._ended = None, True
        self._stopped.release()

    def _stop(self, name: str, inputs: Tensor, output: Tensor) -> None:
        self._now = (name, output)
        self._stopped.release()
        self._go.acquire()
        if self._left:
            raise _Left


class _Left(BaseException):
    """Ends a pass that nobody wants to go on."""


@contextmanager
def beside(
    model: nn.Module,
    names: Iterable[str],
    see: Callable[[str, Any, Any, Tensor], None],
    *,
    copies: bool = True,
) -> Iterator[None]:
    """Call ``see(name, args, kwargs, output)`` at every forward of the named modules.

    The hooks are removed at the end, also after an exception.

    Args:
        model: any module.
        names: of its submodules.
        see: gets the arguments as the caller gave them, before any hook, or the module in place,
            changed them; and the output as the caller gets it, after all hooks.
        copies: whether the arguments are copied for that; else they are None.
    """
    given: dict[str, Any] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given[name] = tree_map(_copied, (args, kwargs)) if copies else (None, None)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            before_args, before_kwargs = given.pop(name)
            see(name, before_args, before_kwargs, output)

        return hook

    handles: list[Any] = []
    try:
        for name in names:
            module = model.get_submodule(name)
            first = module.register_forward_pre_hook(before(name), with_kwargs=True, prepend=True)
            handles.append(first)
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
