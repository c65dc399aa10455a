"""Networks that give maps and boxes: segmentation-models-pytorch and Ultralytics."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from bench.networks.network import Network, image, named


def _segmenter(kind: str, encoder: str = "resnet18", pixels: int = 64, **options: Any) -> Network:
    make = named(
        f"segmentation_models_pytorch.{kind}", encoder, encoder_weights=None, classes=3, **options
    )
    return Network("segmentation-models-pytorch", make, image(pixels))


def _yolo(config: str, kind: str = "DetectionModel") -> Network:
    """A network made from its configuration; what trains and exports it is left aside."""

    def make() -> nn.Module:
        tasks = importlib.import_module("ultralytics.nn.tasks")
        return getattr(tasks, kind)(f"{config}.yaml", verbose=False)

    return Network("ultralytics", make, image(64))


_SMALL = "timm-mobilenetv3_small_minimal_100"
_DETECTORS = "yolov3-tiny yolov5n yolov6n yolov8n yolov9t yolov10n yolo11n yolo12n yolo26n"
_HEADS: dict[str, tuple[str, str]] = {
    "yolov8n-cls": ("yolov8n-cls", "ClassificationModel"),
    "yolo11n-seg": ("yolo11n-seg", "SegmentationModel"),
    "yolov8n-pose": ("yolov8n-pose", "PoseModel"),
    "yolo11n-obb": ("yolo11n-obb", "OBBModel"),
}
_kinds: Callable[..., Network] = partial(_segmenter, encoder=_SMALL)

NETWORKS: dict[str, Network] = {
    "smp Unet": _segmenter("Unet"),
    "smp Unet, attention": _kinds("Unet", decoder_attention_type="scse"),
    "smp UnetPlusPlus": _kinds("UnetPlusPlus"),
    "smp FPN": _kinds("FPN"),
    "smp PSPNet": _kinds("PSPNet"),
    "smp DeepLabV3Plus": _kinds("DeepLabV3Plus"),
    "smp Linknet": _kinds("Linknet"),
    "smp MAnet": _kinds("MAnet"),
    "smp PAN": _segmenter("PAN", _SMALL, 256),
    "smp UPerNet": _segmenter("UPerNet", _SMALL),
    "smp Segformer": _segmenter("Segformer", "mit_b0"),
    **{f"yolo {name}": _yolo(name) for name in _DETECTORS.split()},
    **{f"yolo {name}": _yolo(*how) for name, how in _HEADS.items()},
}
