"""The networks that the papers compress, by name, with weights from safetensors files."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pliant.edits import Swap
from pliant.errors import ModelError
from pliant.nn.genotype import DARTS_V2
from pliant.nn.paths import hidden_norms
from pliant.nn.sequences import STDTNN
from pliant.zoo import mobile
from pliant.zoo.darts import evaluation, supernet
from pliant.zoo.dran import DRAN
from pliant.zoo.fassd import FASSDNet
from pliant.zoo.lenet import LeNet5
from pliant.zoo.morphological import BMResNet
from pliant.zoo.quadratic import QuadraticAlexNet, QuadraticResNet
from pliant.zoo.resnet import ResNet18
from pliant.zoo.resnet_cifar import CifarResNet
from pliant.zoo.staged import StagedResNet
from pliant.zoo.vgg import VGG


@dataclass(frozen=True)
class Network:
    """One network of the zoo.

    Attributes:
        build: makes it with random weights, given `classes=`.
        input: shape of one image, (channels, height, width).
        classes: number of classes of the data set that the papers train it on; channels of the
            images that a network gives which enlarges them.
    """

    build: Callable[..., nn.Module]
    input: tuple[int, ...]
    classes: int

    def example(self, batch: int = 1) -> tuple[Tensor]:
        """Make a batch of standard normal noise, always the same, of the network's input shape."""
        noise = torch.Generator().manual_seed(0)
        return (torch.randn(batch, *self.input, generator=noise),)


WEIGHTS = Path(__file__).parent / "weights"
"""Trained weights that come with the package, a file named NETWORK-DATA each."""

_DIGITS, _SMALL, _LARGE = (1, 28, 28), (3, 32, 32), (3, 224, 224)
_STREET = (3, 256, 512)  # a quarter of the height and width of a Cityscapes image


def _enlarging(scale: Literal[2, 3, 4], classes: int) -> DRAN:
    return DRAN(scale, classes)


def _routed(classes: int) -> nn.Module:
    """MobileNetV2 in two paths."""
    model = mobile.supernet(mobile.MOBILENET_V2, classes=classes)
    assert isinstance(model.blocks, nn.Sequential)
    blocks = tuple(hidden_norms(block) for block in model.blocks)
    spec = {"blocks": blocks, "paths": 2, "width": 64, "classes": 0}
    Swap("blocks", "multi_path", spec).apply(model)
    return model


NETWORKS: dict[str, Network] = {
    "lenet5": Network(LeNet5, _DIGITS, 10),
    "lenet5-wide": Network(partial(LeNet5, wide=True), _DIGITS, 10),
    **{
        f"resnet{depth}": Network(partial(CifarResNet, depth), _SMALL, 10)
        for depth in (20, 32, 44, 56, 110)
    },
    "vgg16-bn": Network(partial(VGG, 16), _SMALL, 10),
    "vgg16-bn-half": Network(partial(VGG, 16, width=0.5), _SMALL, 10),
    "vgg19-bn": Network(partial(VGG, 19), _SMALL, 10),
    "resnet18-cifar": Network(partial(ResNet18, small=True), _SMALL, 10),
    "resnet18-cifar-half": Network(partial(ResNet18, small=True, width=0.5), _SMALL, 10),
    "resnet18": Network(ResNet18, _LARGE, 1000),
    "staged-resnet": Network(lambda classes: StagedResNet(classes=classes), _SMALL, 10),
    "edarts-search": Network(supernet, _SMALL, 10),
    "vpu-search": Network(mobile.supernet, _SMALL, 10),
    "kws-search": Network(partial(mobile.supernet, mobile.KEYWORDS), (1, 10, 51), 12),
    "mobilenet-v2-cifar": Network(partial(mobile.supernet, mobile.MOBILENET_V2), _SMALL, 10),
    "fassd-net": Network(FASSDNet, _STREET, 19),
    "fassd-net-l1": Network(partial(FASSDNet, variant="l1"), _STREET, 19),
    "fassd-net-l2": Network(partial(FASSDNet, variant="l2"), _STREET, 19),
    **{
        f"dran-x{scale}": Network(partial(_enlarging, scale), (3, 48, 48), 3) for scale in (2, 3, 4)
    },
    "dmnn-mobilenet-v2-cifar": Network(_routed, _SMALL, 10),
    "resnet20-v2": Network(BMResNet, _SMALL, 10),
    "bm-resnet20": Network(partial(BMResNet, morphological=True), _SMALL, 10),
    "alexnet-cifar": Network(partial(QuadraticAlexNet, quadratic=False), _SMALL, 10),
    "cqnn-alexnet": Network(QuadraticAlexNet, _SMALL, 10),
    "cqnn-resnet20": Network(QuadraticResNet, _SMALL, 10),
    "stdtnn": Network(lambda classes: STDTNN(2, 3, classes), (2, 3, 100), 4),
    "darts-v2": Network(partial(evaluation, DARTS_V2), _SMALL, 10),
}


def build(name: str, *, classes: int | None = None, weights: str | Path | None = None) -> nn.Module:
    """Build a network of the zoo, with random weights or those of a safetensors file.

    Args:
        name: a key of `NETWORKS`.
        classes: number of logits; the network's own number if None.
        weights: a safetensors file with this network's tensors, or the name of a data set on which
            the network comes trained: lenet5 on ``mnist5k`` (12 epochs, learning rate 0.02, right
            in 97.8 % of the test images).

    Raises:
        ModelError: the name is unknown, or the file does not hold this network's weights.
    """
    if name not in NETWORKS:
        near = difflib.get_close_matches(name, NETWORKS, n=3) or list(NETWORKS)
        raise ModelError(f"No network {name!r} in the zoo; did you mean {', '.join(near)}?")
    if classes is not None and classes < 1:
        raise ModelError(f"A network needs at least 1 class, not {classes}; pass classes=10.")
    network = NETWORKS[name]
    model = network.build(classes=network.classes if classes is None else classes)
    if weights is not None:
        load_weights(model, _file_of(name, weights))
    return model


def _file_of(name: str, weights: str | Path) -> Path:
    """The file of weights that a network comes with, or the path as it was given."""
    own = WEIGHTS / f"{name}-{weights}.safetensors"
    return own if isinstance(weights, str) and own.is_file() else Path(weights)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into a model: every tensor of it, nothing missing, nothing over.

    Only the batch counters of batch norms may be missing; they have no effect on the outputs.

    Raises:
        ModelError: no such file, not safetensors, or other tensors than the model's.
    """
    tensors = _read(Path(path))
    own = model.state_dict()
    missing = [k for k in own if k not in tensors and not k.endswith("num_batches_tracked")]
    if missing or (over := [k for k in tensors if k not in own]):
        what = f"misses {missing[0]!r}" if missing else f"has the foreign tensor {over[0]!r}"
        raise ModelError(
            f"{path} must hold the weights of {type(model).__name__}, but {what}; "
            "check that the network's name fits the file."
        )
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise ModelError(
                f"{path} has {key!r} with shape {tuple(tensor.shape)}, but the model needs "
                f"{tuple(own[key].shape)}; check the network's name and its number of classes."
            )
    model.load_state_dict(tensors, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        raise ModelError(
            f"Weights must be a .safetensors file, not {path.name}: a pickled checkpoint can run "
            "code when it is opened; load it where you trust it and store it with "
            "safetensors.torch.save_file."
        )
    if not path.is_file():
        raise ModelError(f"There is no weights file {path}; check the path.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} must be a readable safetensors file, but reading it failed ({error}); "
            "fetch it again."
        ) from error
