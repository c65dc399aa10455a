"""The networks of the coverage bench: small ones with random weights, built without downloads."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pliant import zoo
from pliant.errors import MissingExtraError
from pliant.surgery.batchnorm import recalibrate

SETTLING = 16  # samples that batch norms see

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """One network to be covered.

    Attributes:
        family: where it comes from: zoo, transformers, torchvision, timm.
        build: makes it in eval mode, with the same random weights every time.
        inputs: makes a batch of so many samples, as keyword arguments of its forward.
    """

    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]


def get(name: str) -> Architecture:
    """Return an architecture by its name."""
    return ARCHITECTURES[name]


def _seeded(build: Callable[[], nn.Module], inputs: Callable[[int], Inputs]) -> nn.Module:
    """Random weights, always the same; batch norms have seen some noise, so signals get through."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_parameters()
    recalibrate(model, [inputs(SETTLING)])
    return model


def _noise(shape: tuple[int, ...], name: str, batch: int) -> Inputs:
    return {name: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))}


def _tokens(length: int, words: int, batch: int) -> Inputs:
    ids = torch.randint(0, words, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _zoo(name: str) -> Architecture:
    inputs = partial(_noise, zoo.NETWORKS[name].input, "x")
    return Architecture("zoo", partial(_seeded, partial(zoo.build, name), inputs), inputs)


def _transformer(
    kind: str,
    config: str,
    inputs: Callable[[int], Inputs],
    part: str = "",
    **options: Any,
) -> Architecture:
    """A network of transformers from a small configuration, or a part of it."""

    def build() -> nn.Module:
        transformers = importlib.import_module("transformers")
        whole: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**options))
        return whole.get_submodule(part)

    return Architecture("transformers", partial(_seeded, build, inputs), inputs)


def _elsewhere(package: str, name: str, attribute: str, pixels: int) -> Architecture:
    def build() -> nn.Module:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(f"{package} is not installed")
        try:
            module = importlib.import_module(attribute)
        except Exception as error:  # a package built for another PyTorch fails in any way
            raise MissingExtraError(
                f"{package} does not import beside this PyTorch ({type(error).__name__})"
            ) from error
        if package == "timm":
            return module.create_model(name, pretrained=False)
        return getattr(module, name)(weights=None)

    inputs = partial(_noise, (3, pixels, pixels), "x")
    return Architecture(package, partial(_seeded, build, inputs), inputs)


_IMAGE = partial(_noise, (3, 64, 64), "pixel_values")
_SMALL: Mapping[str, Any] = {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1]}
_BLOCKS: Mapping[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 192,
}
_VIT: Mapping[str, Any] = {**_BLOCKS, "image_size": 64, "patch_size": 8}

# Networks of the zoo when it was measured; the next measurement takes in what came since.
ZOO = (
    "lenet5", "lenet5-wide", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110",
    "vgg16-bn", "vgg16-bn-half", "vgg19-bn", "resnet18-cifar", "resnet18-cifar-half", "resnet18",
    "edarts-search", "darts-v2",
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    **{name: _zoo(name) for name in ZOO},
    "ResNet": _transformer(
        "ResNetForImageClassification", "ResNetConfig", _IMAGE, embedding_size=32, **_SMALL
    ),
    "ConvNeXt": _transformer("ConvNextForImageClassification", "ConvNextConfig", _IMAGE, **_SMALL),
    "ConvNeXtV2": _transformer(
        "ConvNextV2ForImageClassification", "ConvNextV2Config", _IMAGE, **_SMALL
    ),
    "MobileNetV1": _transformer(
        *("MobileNetV1ForImageClassification", "MobileNetV1Config", _IMAGE),
        depth_multiplier=0.5,
        image_size=64,
    ),
    "MobileNetV2": _transformer(
        *("MobileNetV2ForImageClassification", "MobileNetV2Config", _IMAGE),
        depth_multiplier=0.5,
        image_size=64,
    ),
    "EfficientNet": _transformer(
        *("EfficientNetForImageClassification", "EfficientNetConfig", _IMAGE),
        image_size=64,
        width_coefficient=0.5,
        depth_coefficient=0.5,
        hidden_dim=640,
    ),
    "RegNet": _transformer(
        *("RegNetForImageClassification", "RegNetConfig", _IMAGE),
        embedding_size=32,
        groups_width=16,
        **_SMALL,
    ),
    "ViT": _transformer("ViTForImageClassification", "ViTConfig", _IMAGE, **_VIT),
    "DeiT": _transformer("DeiTForImageClassification", "DeiTConfig", _IMAGE, **_VIT),
    "Swin": _transformer(
        *("SwinForImageClassification", "SwinConfig", _IMAGE),
        image_size=64,
        patch_size=4,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "SegFormer": _transformer(
        *("SegformerForSemanticSegmentation", "SegformerConfig", _IMAGE),
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 4, 4],
        decoder_hidden_size=64,
    ),
    "YOLOS": _transformer(
        *("YolosForObjectDetection", "YolosConfig", _IMAGE),
        **{**_VIT, "image_size": [64, 64]},
        num_detection_tokens=10,
    ),
    "DETR": _transformer(
        *("DetrForObjectDetection", "DetrConfig", _IMAGE),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 32,
            "out_features": ["stage4"],
            **_SMALL,
        },
        num_queries=10,
        d_model=64,
        **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 128 for side in ("encoder", "decoder")},
    ),
    "Wav2Vec2 front": _transformer(
        *("Wav2Vec2Model", "Wav2Vec2Config", partial(_noise, (4000,), "input_values")),
        part="feature_extractor",
        **_BLOCKS,
        conv_dim=[64] * 7,
    ),
    "Wav2Vec2": _transformer(
        *("Wav2Vec2Model", "Wav2Vec2Config", partial(_noise, (4000,), "input_values")),
        **_BLOCKS,
        conv_dim=[64] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    ),
    "Whisper encoder": _transformer(
        *("WhisperModel", "WhisperConfig", partial(_noise, (40, 100), "input_features")),
        part="encoder",
        num_mel_bins=40,
        d_model=96,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=192,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=192,
        vocab_size=60000,
        max_source_positions=50,
    ),
    "BERT": _transformer(
        *("BertForSequenceClassification", "BertConfig", partial(_tokens, 24, 500)),
        **_BLOCKS,
        vocab_size=500,
    ),
    "torchvision ResNet-18": _elsewhere("torchvision", "resnet18", "torchvision.models", 64),
    "torchvision MobileNetV3": _elsewhere(
        "torchvision", "mobilenet_v3_small", "torchvision.models", 64
    ),
    "timm ResNet-18": _elsewhere("timm", "resnet18", "timm", 64),
    "timm MobileNetV3": _elsewhere("timm", "mobilenetv3_small_050", "timm", 64),
}
