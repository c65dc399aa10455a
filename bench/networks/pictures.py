"""Networks of Transformers that see, and those of diffusers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.networks.network import Inputs, Network, image, joined, named, noise, tokens


def of(kind: str, inputs: Callable[[int], Inputs], part: str = "", **options: Any) -> Network:
    """Return a network of transformers from a small configuration, or a part of it."""

    def make() -> nn.Module:
        transformers = importlib.import_module("transformers")
        model = getattr(transformers, kind)
        whole: nn.Module = model(model.config_class(**options))
        return whole.get_submodule(part)

    return Network("transformers", make, inputs)


SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
_STAGES: Mapping[str, Any] = {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1]}
_VIT: Mapping[str, Any] = {**SIZES, "image_size": 64, "patch_size": 8}
_PIXELS = image(64, "pixel_values")
_TEXT = tokens(8, 100)
_TOWERS: Mapping[str, Any] = {
    "text_config": {**SIZES, "vocab_size": 100, "max_position_embeddings": 16},
    "vision_config": {**_VIT, "patch_size": 16},
}


def _diffuser(name: str, inputs: Callable[[int], Inputs], **options: Any) -> Network:
    return Network("diffusers", named(f"diffusers.{name}", **options), inputs)


def _step(batch: int, name: str = "timestep") -> Inputs:
    return {name: torch.full((batch,), 10)}


_UNET: Mapping[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
_LATENT = partial(noise, (4, 16, 16), name="sample")
_PROMPT = partial(noise, (6, 32), name="encoder_hidden_states")

NETWORKS: dict[str, Network] = {
    "hf ResNet": of("ResNetForImageClassification", _PIXELS, embedding_size=32, **_STAGES),
    "hf ConvNextV2": of("ConvNextV2ForImageClassification", _PIXELS, **_STAGES),
    "hf MobileViT": of(
        "MobileViTForImageClassification", _PIXELS, image_size=64, hidden_sizes=[48, 64, 80],
        neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 128],
    ),
    "hf ViT": of("ViTForImageClassification", _PIXELS, **_VIT),
    "hf BEiT": of("BeitForImageClassification", _PIXELS, **_VIT),
    "hf DINOv2": of("Dinov2ForImageClassification", _PIXELS, **_VIT),
    "hf Swin": of(
        "SwinForImageClassification", _PIXELS, image_size=64, patch_size=4, embed_dim=32,
        depths=[2, 2], num_heads=[2, 4], window_size=4,
    ),
    "hf PVTv2": of(
        "PvtV2ForImageClassification", _PIXELS, image_size=64, hidden_sizes=[16, 32, 64, 96],
        depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 4],
    ),
    "hf SegFormer": of(
        "SegformerForSemanticSegmentation", _PIXELS, hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 4], decoder_hidden_size=64,
    ),
    "hf DPT": of(
        "DPTForDepthEstimation", _PIXELS, **{**_VIT, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 32, 48, 64],
        fusion_hidden_size=32,
    ),
    "hf YOLOS": of(
        "YolosForObjectDetection", _PIXELS, **{**_VIT, "image_size": [64, 64]},
        num_detection_tokens=10,
    ),
    "hf DETR": of(
        "DetrForObjectDetection", _PIXELS, use_timm_backbone=False, use_pretrained_backbone=False,
        backbone_config={
            "model_type": "resnet", "embedding_size": 32, "out_features": ["stage4"], **_STAGES,
        },
        num_queries=10, d_model=64,
        **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 128 for side in ("encoder", "decoder")},
    ),
    "hf CLIP": of("CLIPModel", joined(_TEXT, _PIXELS), projection_dim=32, **_TOWERS),
    "hf SigLIP": of("SiglipModel", joined(_TEXT, _PIXELS), **_TOWERS),
    "hf ViTMAE": of(
        "ViTMAEModel", _PIXELS, **_VIT, mask_ratio=0.0, decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
    ),
    "diffusers UNet2D": _diffuser(
        "UNet2DModel", joined(partial(noise, (3, 16, 16), name="sample"), _step), **_UNET,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    ),
    "diffusers UNet2DCondition": _diffuser(
        "UNet2DConditionModel", joined(_LATENT, _step, _PROMPT), **_UNET, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    ),
    "diffusers AutoencoderKL": _diffuser(
        "AutoencoderKL", partial(noise, (3, 32, 32), name="sample"), block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    ),
    "diffusers VQModel": _diffuser(
        "VQModel", partial(noise, (3, 32, 32), name="sample"), block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    ),
    "diffusers DiT": _diffuser(
        "DiTTransformer2DModel",
        joined(
            partial(noise, (4, 8, 8), name="hidden_states"), _step,
            partial(_step, name="class_labels"),
        ),
        sample_size=8, num_layers=2, num_attention_heads=4, attention_head_dim=16,
    ),
    "diffusers PixArt": _diffuser(
        "PixArtTransformer2DModel",
        joined(partial(noise, (4, 8, 8), name="hidden_states"), _step, _PROMPT),
        sample_size=8, num_layers=2, num_attention_heads=4, attention_head_dim=16,
        cross_attention_dim=64, caption_channels=32, use_additional_conditions=False,
    ),
    "diffusers SD3": _diffuser(
        "SD3Transformer2DModel",
        joined(
            partial(noise, (4, 8, 8), name="hidden_states"), _step, _PROMPT,
            partial(noise, (24,), name="pooled_projections"),
        ),
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4,
        attention_head_dim=16, joint_attention_dim=32, caption_projection_dim=64,
        pooled_projection_dim=24, pos_embed_max_size=16,
    ),
}  # fmt: skip
