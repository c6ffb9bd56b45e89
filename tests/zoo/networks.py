"""The networks of the zoo: public image classifiers of three libraries, built without weights.

Inputs are as small as the networks allow, because each takes a training step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from tests.zoo_support import import_timm, import_torchvision

TORCHVISION = {
    "alexnet": 96,
    "vgg11": 64,
    "vgg16_bn": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "densenet121": 64,
    "densenet169": 64,
    "squeezenet1_0": 64,
    "squeezenet1_1": 64,
    "googlenet": 96,
    "inception_v3": 299,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mobilenet_v3_large": 64,
    "mnasnet0_5": 64,
    "mnasnet1_0": 64,
    "shufflenet_v2_x0_5": 64,
    "shufflenet_v2_x1_0": 64,
    "efficientnet_b0": 64,
    "efficientnet_b2": 64,
    "efficientnet_v2_s": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "regnet_y_1_6gf": 64,
    "convnext_tiny": 64,
    "convnext_small": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vit_b_16": 224,
    "vit_b_32": 224,
    "maxvit_t": 224,
}
"""Name -> rows and columns of the input."""

TIMM = {
    "resnet26d": 64,
    "resnetv2_50": 64,
    "seresnet50": 64,
    "skresnet18": 64,
    "res2net50_26w_4s": 64,
    "dla34": 64,
    "hrnet_w18_small": 64,
    "repvgg_a0": 64,
    "ghostnet_100": 64,
    "tf_efficientnet_b0": 64,
    "mobilenetv4_conv_small": 64,
    "fastvit_t8": 64,
    "edgenext_xx_small": 64,
    "inception_v4": 96,
    "xception41": 96,
    "convnext_atto": 64,
    "convnextv2_atto": 64,
    "convmixer_768_32": 64,
    "poolformer_s12": 64,
    "mobilevit_s": 64,
    "pvt_v2_b0": 64,
    "deit_tiny_patch16_224": 224,
    "vit_tiny_patch16_224": 224,
    "cait_xxs24_224": 224,
    "xcit_nano_12_p16_224": 224,
    "coat_lite_tiny": 224,
    "levit_128s": 224,
    "mixer_s16_224": 224,
    "resmlp_12_224": 224,
    "gmlp_s16_224": 224,
}
"""Name -> rows and columns of the input."""

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ResNet": {},
    "RegNet": {},
    "Bit": {},
    "ConvNext": {},
    "ConvNextV2": {},
    "MobileNetV1": {},
    "MobileNetV2": {},
    "EfficientNet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640, "image_size": 64},
    "PoolFormer": {},
    "Segformer": {},
    "PvtV2": {},
    "Cvt": {},
    "FocalNet": {"image_size": 64},
    "ViT": {"image_size": 64, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "Deit": {"image_size": 64, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "ViTMSN": {"image_size": 64, "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "Dinov2": {"image_size": 56, "hidden_size": 192, "num_attention_heads": 3, "use_mask_token": False},
    "Swin": {"image_size": 224},
    "Swinv2": {"image_size": 64, "window_size": 4},
    "Levit": {},
}
"""Family -> changes to its default configuration."""


@dataclass(frozen=True)
class ZooNetwork:
    """One network: where it comes from, how to build it, and the size of its input."""

    package: str
    name: str
    image_size: int
    build: Callable[[], nn.Module] = field(repr=False)

    @property
    def example(self) -> torch.Tensor:
        """Two images, (2, 3, H, W)."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(2, 3, self.image_size, self.image_size, generator=generator)


class _Logits(nn.Module):
    """A classifier of transformers that returns its logits, as a training script would wrap it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values, return_dict=False)[0]


def _build_torchvision(name: str) -> nn.Module:
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return import_torchvision().models.get_model(name, weights=None, **options)


def _build_transformers(family: str) -> nn.Module:
    if importlib.util.find_spec("torchvision"):
        import_torchvision()  # transformers imports it, and must find it whole
    transformers = pytest.importorskip("transformers")
    prefix = next(
        prefix for prefix in (family, family.replace("Deit", "DeiT")) if hasattr(transformers, f"{prefix}Config")
    )
    config = getattr(transformers, f"{prefix}Config")(**TRANSFORMERS[family])
    config.num_labels = 10
    return _Logits(getattr(transformers, f"{prefix}ForImageClassification")(config))


def zoo_networks() -> list[ZooNetwork]:
    """All networks of the zoo."""
    networks = [
        ZooNetwork("torchvision", name, size, lambda name=name: _build_torchvision(name))
        for name, size in TORCHVISION.items()
    ]
    networks += [
        ZooNetwork("timm", name, size, lambda name=name: import_timm().create_model(name, pretrained=False))
        for name, size in TIMM.items()
    ]
    networks += [
        ZooNetwork(
            "transformers",
            family,
            224 if family == "Levit" else changes.get("image_size", 64),
            lambda family=family: _build_transformers(family),
        )
        for family, changes in TRANSFORMERS.items()
    ]
    return networks
