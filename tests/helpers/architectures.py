"""Real architectures, built tiny from their libraries' own constructors, for tables of models and behaviours.

Each is named ``library/name``; all take ``(N, 3, size, size)`` images and give five classes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

CLASSES = 5


@dataclass(frozen=True)
class Architecture:
    """One architecture of the table.

    Attributes:
        name: ``library/name``.
        norms: The kinds of norm layer it has, as the README shows them.
        make: Builds it, with random weights.
        size: Side of the images it takes.
        enable_checkpointing: Switches activation checkpointing on, where the architecture has its own.
    """

    name: str
    norms: str
    make: Callable[[], nn.Module]
    size: int = 32
    enable_checkpointing: Callable[[nn.Module], object] | None = None

    def build(self) -> nn.Module:
        """Return a fresh model in training mode, always with the same weights."""
        return copy.deepcopy(_built(self))

    def images(self, count: int = 4, seed: int = 1) -> Tensor:
        """Return normalised noise."""
        return torch.randn(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(seed))


@functools.cache
def _built(architecture: Architecture) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = architecture.make().train()
        for name, parameter in model.named_parameters():
            if not parameter.any() and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.1)  # a head of zeros would hide every error
        return model


def logits_of(output: object) -> Tensor:
    """Return the logits of whatever a model returns."""
    return output if isinstance(output, Tensor) else output.logits


def _torchvision() -> ModuleType:
    import torchvision

    return torchvision.models


def _timm(name: str, **options: object) -> nn.Module:
    import timm

    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    return timm.create_model(name, num_classes=CLASSES, **options)


def _hf(name: str, **options: object) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def _tv_resnet(**options: object) -> nn.Module:
    resnet = _torchvision().resnet
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=8, **options)


def _tv_densenet() -> nn.Module:
    make = _torchvision().densenet.DenseNet
    return make(8, (2, 2), num_init_features=8, bn_size=2, num_classes=CLASSES)


def _densenet_checkpointing(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "memory_efficient"):
            module.memory_efficient = True


def _tv_mobilenet() -> nn.Module:
    return _torchvision().mobilenet_v2(
        num_classes=CLASSES, width_mult=0.25, inverted_residual_setting=[[1, 8, 1, 1], [4, 16, 2, 2]]
    )


def _tv_convnext() -> nn.Module:
    convnext = _torchvision().convnext
    blocks = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 1)]
    return convnext.ConvNeXt(blocks, stochastic_depth_prob=0.2, num_classes=CLASSES)


def _tv_vit() -> nn.Module:
    make = _torchvision().vision_transformer.VisionTransformer
    return make(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES)


def _tv_swin() -> nn.Module:
    make = _torchvision().swin_transformer.SwinTransformer
    return make([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=CLASSES)


def _frn_resnet() -> nn.Module:
    from timm.layers import FilterResponseNormTlu2d
    from timm.models.resnetv2 import ResNetV2

    return ResNetV2(
        [1, 1], channels=(32, 64), stem_chs=16, num_classes=CLASSES, norm_layer=FilterResponseNormTlu2d, preact=False
    )


def _metaformer(norm: str) -> nn.Module:
    from timm.models import metaformer

    layer = getattr(metaformer, norm)
    return metaformer.MetaFormer(
        depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), norm_layers=layer, num_classes=CLASSES, drop_path_rate=0.1
    )


def _timm_checkpointing(model: nn.Module) -> None:
    model.set_grad_checkpointing()


def _hf_checkpointing(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def _hf_reentrant(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": True})


_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}

ARCHITECTURES = (
    Architecture("torchvision/resnet", "BatchNorm", _tv_resnet),
    Architecture("torchvision/resnet-gn", "GroupNorm", lambda: _tv_resnet(norm_layer=partial(nn.GroupNorm, 4))),
    Architecture("torchvision/densenet", "BatchNorm", _tv_densenet, 32, _densenet_checkpointing),
    Architecture("torchvision/mobilenet_v2", "BatchNorm", _tv_mobilenet),
    Architecture("torchvision/convnext", "LayerNorm, LayerNorm2d", _tv_convnext),
    Architecture("torchvision/vit", "LayerNorm", _tv_vit),
    Architecture("torchvision/swin", "LayerNorm", _tv_swin),
    Architecture("timm/resnet", "BatchNorm", partial(_timm, "test_resnet"), 64, _timm_checkpointing),
    Architecture("timm/resnetv2-frn", "FilterResponseNorm", _frn_resnet, 32, _timm_checkpointing),
    Architecture("timm/byobnet", "BatchNormAct", partial(_timm, "test_byobnet"), 32, _timm_checkpointing),
    Architecture("timm/efficientnet", "BatchNormAct", partial(_timm, "test_efficientnet"), 32, _timm_checkpointing),
    Architecture(
        "timm/efficientnet-gn", "GroupNormAct", partial(_timm, "test_efficientnet_gn"), 32, _timm_checkpointing
    ),
    Architecture(
        "timm/efficientnet-ln", "LayerNormAct", partial(_timm, "test_efficientnet_ln"), 32, _timm_checkpointing
    ),
    Architecture(
        "timm/efficientnet-evos", "EvoNorm", partial(_timm, "test_efficientnet_evos"), 32, _timm_checkpointing
    ),
    Architecture("timm/convnext", "LayerNorm, LayerNorm2d", partial(_timm, "test_convnext"), 32, _timm_checkpointing),
    Architecture("timm/mambaout", "LayerNorm", partial(_timm, "test_mambaout"), 32, _timm_checkpointing),
    Architecture("timm/poolformer", "GroupNorm", partial(_metaformer, "GroupNorm1"), 32, _timm_checkpointing),
    Architecture("timm/metaformer", "LayerNorm", partial(_metaformer, "LayerNorm2dNoBias"), 32, _timm_checkpointing),
    Architecture(
        "timm/coatnet",
        "BatchNormAct, LayerNorm2d",
        partial(_timm, "test_coatnet", img_size=64),
        64,
        _timm_checkpointing,
    ),
    Architecture(
        "timm/maxvit", "BatchNormAct, LayerNorm", partial(_timm, "test_maxvit", img_size=64), 64, _timm_checkpointing
    ),
    Architecture("timm/vit", "LayerNorm", partial(_timm, "test_vit", img_size=64), 64, _timm_checkpointing),
    Architecture("timm/vit-rms", "RmsNorm", partial(_timm, "test_vit4", img_size=64), 64, _timm_checkpointing),
    Architecture("transformers/vit", "LayerNorm", lambda: _hf("ViT", **_VIT), 32, _hf_checkpointing),
    Architecture("transformers/dinov2", "LayerNorm", lambda: _hf("Dinov2", mlp_ratio=2, **_VIT), 32, _hf_reentrant),
    Architecture(
        "transformers/swin",
        "LayerNorm",
        lambda: _hf("Swin", image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
        32,
        _hf_checkpointing,
    ),
    Architecture(
        "transformers/convnextv2",
        "LayerNorm, LayerNorm2d",
        lambda: _hf("ConvNextV2", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], drop_path_rate=0.1),
    ),
    Architecture(
        "transformers/resnet",
        "BatchNorm",
        lambda: _hf("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    ),
    Architecture(
        "transformers/bit",
        "GroupNormAct",
        lambda: _hf("Bit", embedding_size=8, hidden_sizes=[32, 64], depths=[1, 1], num_groups=4),
    ),
    Architecture(
        "transformers/poolformer",
        "GroupNorm",
        lambda: _hf("PoolFormer", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_encoder_blocks=4),
    ),
    Architecture(
        "transformers/mobilevit",
        "BatchNorm, LayerNorm",
        lambda: _hf(
            "MobileViT",
            image_size=64,
            hidden_sizes=[16, 16, 16],
            neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
            num_attention_heads=2,
        ),
        64,
    ),
    Architecture(
        "transformers/cvt",
        "BatchNorm, LayerNorm",
        lambda: _hf("Cvt", embed_dim=[8, 16, 16], num_heads=[1, 2, 2], depth=[1, 2, 3]),
    ),
    Architecture(
        "transformers/segformer",
        "LayerNorm",
        lambda: _hf("Segformer", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2]),
    ),
)
