"""The models: a small built-in CNN, or any image classifier of torchvision, timm or the Hub."""

from __future__ import annotations

import difflib
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from entprop_wrap.cli.data import say
from entprop_wrap.cli.options import SMALL
from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import CheckpointError, ConfigurationError
from entprop_wrap.finetuning import repair_keep_probabilities

_SEVERAL_HEADS = ("googlenet", "inception_v3")


@dataclass
class Blueprint:
    """How to build a model, and what it takes."""

    build: Callable[[tuple[str, ...]], nn.Module]  # from class names, fresh each time
    space: PixelSpace
    size: int  # height and width of its images, pixels
    load: str  # three lines of Python that load what training writes, with {folder} and {classes}


def find(options: Namespace) -> Blueprint:
    """Find ``options.model``: the built-in CNN, a folder or Hub id, or a name of torchvision or timm, in this order."""
    name = options.model
    if name == SMALL:
        load = _load("from entprop_wrap.cli.models import small_cnn", "small_cnn({classes})")
        return Blueprint(
            lambda classes: small_cnn(len(classes)), PixelSpace((0.5,), (0.5,)), options.image_size or 32, load
        )
    if Path(name).is_dir() or "/" in name:
        return hub(name, options)
    import torchvision

    if name in torchvision.models.list_models(module=torchvision.models):
        return of_torchvision(name, options)
    import timm

    if not timm.is_model(name):
        known = [SMALL, *torchvision.models.list_models(module=torchvision.models), *timm.list_models()]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigurationError(
            f"--model {name}: expected {SMALL}, a local folder, a Hub id such as microsoft/resnet-50, or a name that "
            f"torchvision.models.list_models() or timm.list_models() knows.{hint}"
        )
    config: Any = timm.get_pretrained_cfg(name)
    size = options.image_size or config.input_size[-1]
    return Blueprint(
        lambda classes: timm.create_model(name, pretrained=options.pretrained, num_classes=len(classes)),
        PixelSpace.from_timm(config),
        size,
        _load("import timm", f'timm.create_model("{name}", num_classes={{classes}})'),
    )


def _load(library: str, model: str) -> str:
    weights = 'model.load_state_dict(load_file("{folder}/model.safetensors"))'
    return f"{library}; from safetensors.torch import load_file\nmodel = {model}\n{weights}"


def start_from(model: nn.Module, path: Path | None) -> nn.Module:
    """Give a model trained weights: of a safetensors file, or of the model.safetensors in a folder; None: as it is."""
    if path is None:
        return model
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        model.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            f"--weights {path}: expected the weights of this very model, in a safetensors file or in a folder such as "
            f"outputs/train/vanilla-seed0/model. {str(error)[:500]}"
        ) from error
    return model


def of_torchvision(name: str, options: Namespace) -> Blueprint:
    """Return a classifier of torchvision; if pretrained, with published weights but for a head of other classes."""
    from torchvision.models import get_model, get_model_weights

    made_for = get_model_weights(name).DEFAULT.transforms()
    size = options.image_size or made_for.crop_size[0]
    # Two have further heads, which no method trains, and shift their images where they are pretrained.
    chosen = {"aux_logits": False, "transform_input": options.pretrained} if name in _SEVERAL_HEADS else {}
    if name.startswith("vit_"):
        chosen["image_size"] = size

    def build(classes: tuple[str, ...]) -> nn.Module:
        model: nn.Module = get_model(name, num_classes=len(classes), **chosen)
        if options.pretrained:
            own, published = model.state_dict(), get_model(name, weights="DEFAULT").state_dict()
            other = {key for key in own if own[key].shape != published[key].shape}
            if wrong := [key for key in sorted(other) if own[key].shape[1:] != published[key].shape[1:]]:
                raise ConfigurationError(
                    f"--image-size {size}: the published weights of {name} are for images of {made_for.crop_size[0]} "
                    f"px, {wrong[0]} has another shape. Leave --image-size out."
                )
            model.load_state_dict({key: (own if key in other else published)[key] for key in own})
        return model

    said = "".join(f", {key}={value}" for key, value in chosen.items())
    load = _load("import torchvision", f'torchvision.models.get_model("{name}", num_classes={{classes}}{said})')
    return Blueprint(build, PixelSpace(tuple(made_for.mean), tuple(made_for.std)), size, load)


def hub(name: str, options: Namespace) -> Blueprint:
    """Return a Hugging Face image classifier, by Hub id or from a local folder."""
    import transformers

    auto: Any = transformers
    try:
        processor = auto.AutoImageProcessor.from_pretrained(name)
        auto.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        where = "a folder" if Path(name).is_dir() else "no local folder; as a Hub id"
        why = str(error).strip().splitlines()[0]
        raise ConfigurationError(f"--model {name} is {where}, it has no image classifier to load: {why}") from error

    def build(classes: tuple[str, ...]) -> nn.Module:
        labels = {"id2label": dict(enumerate(classes)), "label2id": {label: i for i, label in enumerate(classes)}}
        if options.pretrained:
            model: nn.Module = auto.AutoModelForImageClassification.from_pretrained(
                name, ignore_mismatched_sizes=True, **labels
            )
        else:
            model = auto.AutoModelForImageClassification.from_config(auto.AutoConfig.from_pretrained(name, **labels))
        for note in repair_keep_probabilities(model):
            say(note)
        return model.float()  # some are stored in half precision, in which most updates of weights round to nothing

    size = options.image_size or processor(Image.new("RGB", (256, 256)), return_tensors="pt")["pixel_values"].shape[-1]
    load = (
        "from transformers import AutoModelForImageClassification\n"
        'model = AutoModelForImageClassification.from_pretrained("{folder}")\n'
        "model.eval()"
    )
    return Blueprint(build, PixelSpace.from_processor(processor), size, load)


def small_cnn(classes: int) -> nn.Module:
    """Return four convolutions with batch norm, for 32 px images: 60,000 parameters."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(3, 16, 1),
        *block(16, 32, 2),
        *block(32, 64, 2),
        *block(64, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )
