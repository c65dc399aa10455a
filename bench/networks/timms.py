"""Networks of timm: its own small test networks, and the smallest of its modern families."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import nn

from bench.networks.network import Network, image, named


def _of(name: str, pixels: int = 64, **options: Any) -> Network:
    make = named("timm.create_model", name, pretrained=False, num_classes=10, **options)
    return Network("timm", make, image(pixels))


def _class(path: str, pixels: int = 64, **options: Any) -> Network:
    make = named(f"timm.models.{path}", num_classes=10, **options)
    return Network("timm", make, image(pixels))


def _mixer(block: str) -> nn.Module:
    mixers = importlib.import_module("timm.models.mlp_mixer")
    return mixers.MlpMixer(num_classes=10, mlp_ratio=4, block_layer=getattr(mixers, block), **_FLAT)


_TESTS = """byobnet coatnet convnext convnext2 convnext3 efficientnet efficientnet_evos
efficientnet_gn efficientnet_ln mambaout maxvit nfnet resnet vit vit2 vit3 vit4 vit_relpos"""
_MODERN = """mobilenetv4_conv_small_035 mobileone_s0 repvgg_a0 repghostnet_050 ghostnetv3_050
edgenext_xx_small efficientvit_b0 mobilevit_xxs mobilevitv2_050 dla46_c regnetz_005 gernet_s
ese_vovnet19b_slim_dw inception_next_atto starnet_s1 lcnet_035 tinynet_e hgnetv2_b0
pvt_v2_b0 resnest14d mixnet_s hardcorenas_a convnextv2_atto nf_regnet_b0 rexnet_100
fastvit_t8 repvit_m0_9 shvit_s1"""
_FLAT = {"img_size": 64, "patch_size": 8, "num_blocks": 2, "embed_dim": 64}
_TINY = {"embed_dim": 64, "depth": 2, "num_heads": 4}

NETWORKS: dict[str, Network] = {
    **{f"timm test_{name}": _of(f"test_{name}", 160) for name in _TESTS.split()},
    **{
        f"timm {name}": _of(name)
        for name in _MODERN.split()
    },
    "timm deit_tiny": _of("deit_tiny_patch16_224", img_size=64, depth=3),
    "timm eva02_tiny": _of("eva02_tiny_patch14_224", 56, img_size=56, depth=3),
    "timm beit": _of("beit_base_patch16_224", img_size=64, **_TINY),
    "timm cait": _of("cait_xxs24_224", img_size=64, depth=3),
    "timm xcit": _of("xcit_nano_12_p16_224", img_size=64, depth=3),
    "timm pit": _of("pit_ti_224", img_size=64),
    "timm levit_128s": _of("levit_128s", 224),
    "timm efficientformerv2_s0": _of("efficientformerv2_s0", 224),
    "timm coat_lite_tiny": _of("coat_lite_tiny", img_size=64),
    "timm crossvit_9": _of("crossvit_9_240", 240),
    "timm swinv2": _of(
        "swinv2_tiny_window8_256", img_size=64, window_size=4, embed_dim=32, depths=(2, 2),
        num_heads=(2, 4),
    ),
    "timm mixer": _class("mlp_mixer.MlpMixer", **_FLAT),
    "timm gmlp": Network("timm", partial(_mixer, "SpatialGatingBlock"), image(64)),
    "timm resmlp": Network("timm", partial(_mixer, "ResBlock"), image(64)),
    "timm sequencer2d": _of("sequencer2d_s", img_size=64, layers=(1, 1, 1, 1)),
    "timm tiny_vit": _of("tiny_vit_5m_224", 224),
    "timm hiera": _of("hiera_tiny_224", 224, embed_dim=32, stages=(1, 1, 1, 1)),
    "timm focalnet": _class("focalnet.FocalNet", embed_dim=32, depths=(1, 1, 1, 1)),
    "timm poolformer": _class(
        "metaformer.MetaFormer", depths=(1, 1, 1, 1), dims=(32, 64, 96, 128), use_mlp_head=False
    ),
    "timm davit": _of(
        "davit_tiny", 64, embed_dims=(32, 64, 96, 128), depths=(1, 1, 1, 1),
        num_heads=(2, 2, 3, 4), window_size=4,
    ),
    "timm convit": _of("convit_tiny", img_size=64, depth=3, local_up_to_layer=2),
    "timm convmixer": _class("convmixer.ConvMixer", dim=64, depth=2),
}  # fmt: skip
