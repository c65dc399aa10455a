"""The sides of a module from which channels can leave, and along which axes they lie."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from pliant.nn import kinds

CONVS = kinds.CONV
KERNELS = (*CONVS, *kinds.TRANSPOSED)
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
LAST = (nn.LayerNorm, nn.RMSNorm)


def sides(module: nn.Module) -> dict[str, int]:
    """Return the sides of a layer from which channels can be removed, with their sizes."""
    if type(module) is nn.Linear:
        return {"in": module.in_features, "out": module.out_features}
    if type(module) in NORMS:
        size: Any = module.num_features
        return {"channels": size}
    if type(module) is nn.GroupNorm:
        return {"channels": module.num_channels}
    if type(module) is nn.PReLU and module.num_parameters > 1:
        return {"channels": module.num_parameters}
    if not isinstance(module, KERNELS) or type(module) not in KERNELS:
        return {"channels": found[1]} if (found := apart(module))[0] else {}
    if module.groups == module.in_channels > 1:
        return {"channels": module.in_channels}
    return {"in": module.in_channels, "out": module.out_channels}


def over_all(module: nn.Module) -> dict[str, int]:
    """Return the side of a norm that takes its statistics over all of its channels, if it is one.

    PyTorch's layer norm and RMS norm of one axis, a group norm of one group, and layers of other
    classes that call themselves norms and have a number for every channel.
    """
    if type(module) in LAST:
        shape: Any = module.normalized_shape
        return {"channels": shape[0]} if len(shape) == 1 else {}
    if isinstance(module, nn.GroupNorm):
        return sides(module) if module.num_groups == 1 else {}
    kind = type(module).__name__.lower()
    named = "norm" in kind and not any(word in kind for word in ("batch", "instance", "group"))
    named = named or kind.endswith("grn") or isinstance(module, LAST)
    found = sides(module) if named and not isinstance(module, NORMS) else {}
    return found if "channels" in found else {}


def held(module: nn.Module) -> dict[str, int]:
    """Return the axes of the tensors that a module which is no such layer holds by itself.

    A block may scale what it gives, a network may begin with tokens and positions of its own.

    Returns:
        For the name of each parameter or buffer and each axis, as ``scale:0``, how many numbers
        there are along it, if there are several.
    """
    own = type(module).__module__.startswith(("torch.", "pliant.nn"))
    lists = isinstance(module, nn.ParameterList | nn.ParameterDict)
    if (own and not lists) or parametrize.is_parametrized(module):
        return {}
    if sides(module) or over_all(module):
        return {}
    tensors = {**module._parameters, **module._buffers}
    return {
        f"{name}:{axis}": size
        for name, tensor in tensors.items()
        if tensor is not None and tensor.is_floating_point()
        for axis, size in enumerate(tensor.shape)
        if size > 1
    }


def every_side(module: nn.Module) -> dict[str, int]:
    """Return the sides of any module from which channels can be removed, with their sizes."""
    return sides(module) or over_all(module) or held(module)


def is_tensor(side: str) -> bool:
    """Say whether a side is one of the tensors that a module holds by itself."""
    return ":" in side


def tensor_of(side: str) -> tuple[str, int]:
    """Return the name of the tensor that a side is, and its axis."""
    name, _, axis = side.rpartition(":")
    return name, int(axis)


def each_of(module: nn.Module, side: str) -> tuple[int, ...]:
    """Return how many parameters and saved bytes go with each channel of a tensor; () of a layer.

    Args:
        module: a module that holds tensors.
        side: one of them.
    """
    if not is_tensor(side):
        return ()
    name, axis = tensor_of(side)
    tensor: Tensor = getattr(module, name)
    count = tensor.numel() // tensor.shape[axis]
    saved = name not in module._non_persistent_buffers_set
    return count * (name in module._parameters), count * tensor.element_size() * saved


def without_statistics(module: Any, x: Tensor) -> Tensor:
    """Compute something else of every channel, by itself, with all tensors of a norm.

    Args:
        module: a norm over all channels.
        x: what it reads.
    """
    axis = channel_axis(module, x)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.numel() > 1:
            shape = [1] * x.dim()
            shape[axis] = -1
            x = x * (1 + tensor.reshape(shape))
    return x


def apart(module: Any) -> tuple[dict[str, int], int]:
    """The tensors of a layer of another class that treats every channel apart, if it is one.

    A batch norm that also activates, by a layer in it or not, a frozen one, a scale: each tensor
    has one number for every channel, along one axis. That the layer does nothing else is for the
    proof to say.

    Returns:
        The axis of each tensor by name, and how many channels there are; nothing where it is none.
    """
    own = type(module).__module__.startswith(("torch.", "pliant.nn"))
    other = isinstance(module, (*NORMS, nn.GroupNorm, nn.PReLU)) or not own
    parts = [part for child in module.children() for part in child.modules()]
    holding = any(any(part._parameters) or any(part._buffers) for part in parts)
    if not other or holding or parametrize.is_parametrized(module):
        return {}, 0
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wide = {name: tensor for name, tensor in held.items() if tensor.numel() > 1}
    sizes = {tensor.numel() for tensor in wide.values()}
    if len(sizes) != 1 or any(max(tensor.shape) != tensor.numel() for tensor in wide.values()):
        return {}, 0
    size = sizes.pop()
    return {name: list(tensor.shape).index(size) for name, tensor in wide.items()}, size


def channel_axis(module: nn.Module, given: Tensor) -> int:
    """Return along which axis of what it reads a layer treats every channel apart."""
    if type(module) in LAST:
        return given.dim() - 1
    plain = type(module) in (*NORMS, nn.GroupNorm, nn.PReLU)
    tensors, size = ({}, 0) if plain else apart(module)
    for name, axis in tensors.items():
        ahead = getattr(module, name).dim() - axis
        if ahead > 1:
            return given.dim() - ahead
    last = given.dim() == 3 or given.dim() < 2 or given.shape[1] != size
    return given.dim() - 1 if tensors and last and given.shape[-1] == size else 1
