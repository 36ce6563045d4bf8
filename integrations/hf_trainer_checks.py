"""What a Hugging Face Trainer must be like for the callback, and what its batches must hold."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from entprop_wrap.checks import check_takes_images
from entprop_wrap.errors import ConfigurationError, UnsupportedModelError
from entprop_wrap.perturbation import PixelSpace

__all__ = ["check_columns", "images_name_of", "pixel_space_of", "refuse", "split"]


def pixel_space_of(trainer: Any) -> PixelSpace:
    """Return the pixel space of the Trainer's ``processing_class``."""
    if trainer.processing_class is None:
        raise ConfigurationError(
            "How are the images normalised? The Trainer has no processing_class to say. Write Trainer(..., "
            "processing_class=image_processor) or EntPropCallback(..., pixel_space=PixelSpace(mean, std))."
        )
    return PixelSpace.from_processor(trainer.processing_class)


def refuse(trainer: Any) -> None:
    """Raise :class:`UnsupportedModelError` for models without images and for parallelism that cannot be right."""
    check_takes_images(trainer.model)
    found = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        "DataParallel over several GPUs": trainer.args.n_gpu > 1,
    }
    for name, present in found.items():
        if present:
            raise UnsupportedModelError(
                f"EntPropCallback does not work with {name} in the Hugging Face Trainer. Expected one process per GPU "
                "(torchrun, DDP); entprop.Trainer also trains under FSDP2."
            )


def images_name_of(model: nn.Module) -> str:
    """Return the name under which ``model`` takes images."""
    if "pixel_values" in inspect.signature(model.forward).parameters:
        return "pixel_values"  # what image processors make; Perceiver takes it beside its main input
    return getattr(model, "main_input_name", "pixel_values")


def check_columns(trainer: Any) -> None:
    """Raise :class:`ConfigurationError` if the Trainer removes the columns that the images are made of."""
    # The Trainer drops columns by the model's signature before a lazy transform has made pixel_values of them.
    dataset = trainer.train_dataset
    columns: list[str] = getattr(dataset, "column_names", None) or []
    name = images_name_of(trainer.model)
    lazy = (getattr(dataset, "format", None) or {}).get("type") == "custom" if columns else False
    if trainer.args.remove_unused_columns and lazy and name not in columns:
        raise ConfigurationError(
            f"The data set's transform makes {name!r} of its columns {', '.join(map(repr, columns))}, but the Trainer "
            "removes columns that the model does not take. Write TrainingArguments(..., remove_unused_columns=False)."
        )


def split(inputs: dict[str, Any], images_name: str, labels_name: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the images, the labels and what else is in a batch."""
    if missing := [name for name in (images_name, labels_name) if inputs.get(name) is None]:
        raise ConfigurationError(
            f"The batch has no {' and no '.join(map(repr, missing))}; found {', '.join(map(repr, inputs))}. Let the "
            "data collator name them so; if the columns exist, write TrainingArguments(..., "
            "remove_unused_columns=False)."
        )
    others = {name: value for name, value in inputs.items() if name not in (images_name, labels_name)}
    if tensors := [name for name, value in others.items() if isinstance(value, Tensor) and value.ndim]:
        raise ConfigurationError(
            f"The batch has {tensors[0]!r} beside images and labels. Images are mixed and selected, and it cannot "
            "follow: leave it out of the batch."
        )
    return inputs[images_name], inputs[labels_name], others
