"""Every image classifier that transformers knows by name, built tiny from its configuration alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

CLASSES = 5

#: Class name -> kind of configuration, as AutoModelForImageClassification maps them.
KINDS = {
    name: kind
    for kind, names in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.items()
    for name in ((names,) if isinstance(names, str) else names)
}

#: Needs a package that is no dependency of transformers: class name -> the package.
NEEDS = {"DinatForImageClassification": "natten", "NatForImageClassification": "natten"}

#: Takes something else than images: class name -> what the error says.
REFUSED = {
    "ImageGPTForImageClassification": "takes input_ids",
    "ShieldGemma2ForImageClassification": "takes input_ids",
    "PPLCNetForImageClassification": "found BaseModelOutputWithNoAttention with",  # logits as last_hidden_state
    "Siglip2ForImageClassification": "takes patches of images of several sizes",
}

#: Does not build, for an error in transformers itself.
BROKEN = {"ViTHybridForImageClassification"}

#: Gone from transformers 5.
GONE = {
    "EfficientFormerForImageClassification",
    "EfficientFormerForImageClassificationWithTeacher",
    "NatForImageClassification",
    "VanForImageClassification",
    "ViTHybridForImageClassification",
}

_NUMBERS = {
    "d_latents": 16,
    "d_model": 16,
    "decoder_hidden_size": 16,
    "embed_dim": 16,
    "embedding_size": 8,
    "groups_width": 8,
    "head_dim": 8,
    "hidden_size": 16,
    "image_size": 32,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
    "n_embd": 16,
    "n_head": 2,
    "n_layer": 1,
    "num_attention_heads": 2,
    "num_cross_attention_heads": 1,
    "num_groups": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "num_latents": 4,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2,
    "projection_dim": 16,
    "projection_size": 16,
    "vocab_size": 32,
}
_ENTRIES_OF_LISTS = {
    "depth": 1,
    "depths": 1,
    "embed_dim": 16,
    "embed_dims": 16,
    "hidden_sizes": 16,
    "image_size": 32,
    "num_attention_heads": 2,
    "num_heads": 2,
}
_SWIN = {"depths": [1, 1], "num_heads": [2, 2], "window_size": 4}

#: What the rules above do not get right, by kind; ``size`` is that of the images.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "cvt": {"depth": [1, 2, 3]},
    "donut-swin": _SWIN,
    "efficientformer": {"hidden_sizes": [16, 16, 16, 16], "hidden_size": 16, "dim": 16, "resolution": 1, "key_dim": 8},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
    "hgnet_v2": {
        "hidden_sizes": [16, 16, 16, 16],
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 16, 16],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 16, 16, 16],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
    },
    "levit": {"size": 64, "image_size": 64},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {"neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32], "size": 64, "image_size": 64},
    "mobilevitv2": {"width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1], "size": 64, "image_size": 64},
    "perceiver": {"size": 16, "image_size": 16},
    "pp_lcnet": {"scale": 0.25, "class_expand": 16},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "textnet": {"stem_out_channels": 16},
    "timm_wrapper": {"architecture": "test_resnet"},
}


def small(default: dict[str, Any]) -> dict[str, Any]:
    """Return smaller values for the sizes in the default of a configuration, and no dropout."""
    values: dict[str, Any] = {}
    for name, value in default.items():
        if isinstance(value, dict) and name.endswith("_config"):
            values[name] = small(value)
        elif "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            values[name] = type(value)(0)
        elif "drop" in name and isinstance(value, (list, tuple)):
            values[name] = [0.0] * len(value)
        elif name in _NUMBERS and type(value) is int:
            values[name] = _NUMBERS[name]
        elif name in _ENTRIES_OF_LISTS and isinstance(value, (list, tuple)) and value:
            values[name] = [_ENTRIES_OF_LISTS[name]] * len(value)
    if isinstance(default.get("patch_size"), int) and "num_hidden_layers" in default and "hidden_sizes" not in default:
        values["patch_size"] = 8
    return values


def image_size(name: str) -> int:
    """Side of the images that the model of this class takes."""
    return EXCEPTIONS.get(KINDS[name], {}).get("size", 32)


def build_tiny(name: str) -> nn.Module:
    """Return a tiny model in training mode, always with the same weights, none of them trivial."""
    kind = KINDS[name]
    config_class = CONFIG_MAPPING[kind]
    options = {**small(config_class().to_dict()), **EXCEPTIONS.get(kind, {})}
    options.pop("size", None)
    torch.manual_seed(3)
    model = getattr(transformers, name)(config_class(num_labels=CLASSES, **options)).train()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model
