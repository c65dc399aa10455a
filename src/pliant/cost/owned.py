"""What modules own: their parameters, what they save, and which modules are parts of a layer."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pliant.cost.macs import is_packed

FLOAT = 4  # bytes of a number where no parameter says how many


def subtree(layer: nn.Module) -> Iterator[nn.Module]:
    """The layer and the modules that are only its parts, not layers of their own."""
    if isinstance(layer, nn.MultiheadAttention):  # out_proj is read, never called
        yield from layer.modules()
        return
    yield layer
    if parametrize.is_parametrized(layer):
        parts = layer.parametrizations
        assert isinstance(parts, nn.Module)
        yield from parts.modules()


def numbers(modules: Iterable[nn.Module]) -> int:
    """Count parameters, each once, and what packed layers stand for."""
    owners = list(modules)
    packed = sum(owner.numbers for owner in owners if is_packed(owner))
    return packed + sum(p.numel() for p in _unique(own(owners)))


def own(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Go through the parameters of modules, without those of their children."""
    return (parameter for module in modules for parameter in module.parameters(recurse=False))


def _saved(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Parameters and persistent buffers, each tensor once."""
    owners = list(modules)
    buffers = (
        buffer
        for owner in owners
        for name, buffer in owner._buffers.items()
        if buffer is not None and name not in owner._non_persistent_buffers_set
    )
    return _unique([*own(owners), *buffers])


def stored_bytes(modules: Iterable[nn.Module]) -> int:
    """Count the bytes of parameters and saved buffers."""
    return sum(t.numel() * t.element_size() for t in _saved(modules))


def itemsize(modules: Iterable[nn.Module]) -> int:
    """Bytes of a number, by the first parameter that holds such."""
    floating = (p for p in own(modules) if p.is_floating_point())
    return next((p.element_size() for p in floating), FLOAT)


def _unique(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    return iter({id(tensor): tensor for tensor in tensors}.values())
