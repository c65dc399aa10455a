"""Networks of torchvision: classification, segmentation, detection, video."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.networks.network import Inputs, Network, image, named, noise

_MODELS = "torchvision.models"
_TEN: Mapping[str, Any] = {"weights": None, "num_classes": 10}


def _plain(name: str, pixels: int = 64, **options: Any) -> Network:
    return Network("torchvision", named(f"{_MODELS}.{name}", **_TEN, **options), image(pixels))


def _swin(version: int) -> nn.Module:
    swin = importlib.import_module(f"{_MODELS}.swin_transformer")
    more = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return swin.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        num_classes=10,
        **(more if version == 2 else {}),
    )


def _resnext() -> nn.Module:
    resnet = importlib.import_module(f"{_MODELS}.resnet")
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 10, groups=8, width_per_group=8)


def _convnext() -> nn.Module:
    convnext = importlib.import_module(f"{_MODELS}.convnext")
    widths = [(32, 64), (64, 96), (96, 128), (128, None)]
    return convnext.ConvNeXt([convnext.CNBlockConfig(a, b, 1) for a, b in widths], num_classes=10)


def _maxvit() -> nn.Module:
    return importlib.import_module(f"{_MODELS}.maxvit").MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=10,
    )


def _segmenter(name: str, first: str = "x") -> Network:
    make = named(f"{_MODELS}.segmentation.{name}", **_TEN, weights_backbone=None)
    return Network("torchvision", make, image(64, first))


def _images(batch: int) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return {"images": [torch.rand(3, 64, 64, generator=generator) for _ in range(batch)]}


def _small_detector(kind: str) -> nn.Module:
    detection = importlib.import_module(f"{_MODELS}.detection")
    body = importlib.import_module(f"{_MODELS}.detection.backbone_utils")
    backbone = body.resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return getattr(detection, kind)(backbone, num_classes=5, min_size=64, max_size=96)


def _detector(make: Callable[[], nn.Module]) -> Network:
    return Network("torchvision", make, _images)


def _video(name: str, frames: int = 8, pixels: int = 32, **options: Any) -> Network:
    inputs = partial(noise, (3, frames, pixels, pixels))
    return Network("torchvision", named(f"{_MODELS}.video.{name}", **_TEN, **options), inputs)


def _r2plus1d() -> nn.Module:
    resnet = importlib.import_module(f"{_MODELS}.video.resnet")
    makers = [resnet.Conv2Plus1D] * 4
    return resnet.VideoResNet(
        resnet.BasicBlock, makers, [1, 1, 1, 1], resnet.R2Plus1dStem, num_classes=10
    )


def _mvit() -> nn.Module:
    mvit = importlib.import_module(f"{_MODELS}.video.mvit")

    def block(heads: int, a: int, b: int, kernel: int, stride: int) -> Any:
        return mvit.MSBlockConfig(
            num_heads=heads,
            input_channels=a,
            output_channels=b,
            kernel_q=[3, 3, 3] if kernel else [],
            kernel_kv=[3, 3, 3],
            stride_q=[1, stride, stride] if kernel else [],
            stride_kv=[1, 2, 2],
        )

    blocks = [block(1, 32, 32, 0, 1), block(2, 32, 64, 1, 2), block(2, 64, 64, 0, 1)]
    return mvit.MViT(
        spatial_size=(32, 32), temporal_size=8, block_setting=blocks, residual_pool=False,
        residual_with_cls_embed=True, rel_pos_embed=False, proj_after_attn=False, num_classes=10,
    )  # fmt: skip


def _swin3d() -> nn.Module:
    return importlib.import_module(f"{_MODELS}.video.swin_transformer").SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=32, depths=[2, 2], num_heads=[2, 4],
        window_size=[4, 4, 4], num_classes=10,
    )  # fmt: skip


NETWORKS: dict[str, Network] = {
    "tv alexnet": _plain("alexnet"),
    "tv vgg11_bn": _plain("vgg11_bn"),
    "tv resnet18": _plain("resnet18"),
    "tv resnext": Network("torchvision", _resnext, image(64)),
    "tv densenet121": _plain("densenet121"),
    "tv squeezenet1_1": _plain("squeezenet1_1"),
    "tv googlenet": _plain("googlenet", init_weights=False, aux_logits=False),
    "tv inception_v3": _plain("inception_v3", 96, init_weights=False, aux_logits=False),
    "tv mobilenet_v2": _plain("mobilenet_v2", width_mult=0.5),
    "tv mobilenet_v3_small": _plain("mobilenet_v3_small"),
    "tv shufflenet_v2_x0_5": _plain("shufflenet_v2_x0_5"),
    "tv mnasnet0_5": _plain("mnasnet0_5"),
    "tv efficientnet_b0": _plain("efficientnet_b0"),
    "tv efficientnet_v2_s": _plain("efficientnet_v2_s"),
    "tv regnet_x_400mf": _plain("regnet_x_400mf"),
    "tv regnet_y_400mf": _plain("regnet_y_400mf"),
    "tv convnext": Network("torchvision", _convnext, image(64)),
    "tv vit": Network(
        "torchvision",
        named(
            f"{_MODELS}.VisionTransformer", image_size=32, patch_size=8, num_layers=2,
            num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10,
        ),
        image(32),
    ),
    "tv swin": Network("torchvision", partial(_swin, 1), image(64)),
    "tv swin_v2": Network("torchvision", partial(_swin, 2), image(64)),
    "tv maxvit": Network("torchvision", _maxvit, image(64)),
    "tv fcn_resnet50": _segmenter("fcn_resnet50"),
    "tv deeplabv3_mobilenet": _segmenter("deeplabv3_mobilenet_v3_large"),
    "tv lraspp_mobilenet": _segmenter("lraspp_mobilenet_v3_large", "input"),
    "tv fasterrcnn": _detector(partial(_small_detector, "FasterRCNN")),
    "tv maskrcnn": _detector(partial(_small_detector, "MaskRCNN")),
    "tv retinanet": _detector(partial(_small_detector, "RetinaNet")),
    "tv fcos": _detector(partial(_small_detector, "FCOS")),
    "tv ssdlite": _detector(
        named(
            f"{_MODELS}.detection.ssdlite320_mobilenet_v3_large", weights=None,
            weights_backbone=None, num_classes=5,
        )
    ),
    "tv r3d_18": _video("r3d_18"),
    "tv r2plus1d": Network("torchvision", _r2plus1d, partial(noise, (3, 8, 32, 32))),
    "tv mvit": Network("torchvision", _mvit, partial(noise, (3, 8, 32, 32))),
    "tv swin3d": Network("torchvision", _swin3d, partial(noise, (3, 8, 32, 32))),
}  # fmt: skip
