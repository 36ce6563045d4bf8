"""What Lightning, a LightningModule and its batches must be like for the callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import LBFGS

from entprop_wrap.errors import ConfigurationError, UnsupportedModelError

__all__ = ["batch_of", "find_classifier", "read_batch", "refuse", "refuse_optimizers"]

_IMAGES = ("pixel_values", "images", "image")
_LABELS = ("labels", "label")
_AVERAGING = {"StochasticWeightAveraging", "WeightAveraging"}


def refuse(trainer: Any, module: Any, callback: Any) -> None:
    """Raise for what is not tested or cannot be right, when ``fit`` begins."""
    if not isinstance(module, LightningModule):
        raise ConfigurationError(
            f"Expected a LightningModule of the package `lightning`, found {type(module).__name__}, which is none. "
            "Write `import lightning as L`, and L.LightningModule and L.Trainer for those of pytorch_lightning."
        )
    if any(type(other) is type(callback) and other is not callback for other in trainer.callbacks):
        raise ConfigurationError("The Trainer has two EntPropLightningCallbacks. Expected one, with one method.")
    if not module.automatic_optimization:
        raise UnsupportedModelError(
            "EntPropLightningCallback works with automatic optimization. With automatic_optimization=False call "
            "entprop.training_step(self.model, images, labels, backward=self.manual_backward) in your training_step; "
            "no callback is needed."
        )
    strategy = trainer.strategy
    if type(strategy) not in (SingleDeviceStrategy, DDPStrategy) or getattr(strategy, "_ddp_kwargs", {}).get(
        "static_graph"
    ):
        raise UnsupportedModelError(
            f"EntPropLightningCallback does not work with {type(strategy).__name__}, or with a static graph. Expected "
            "one device, or one process per device with strategy='ddp'; entprop.Trainer also trains under FSDP2."
        )
    if getattr(strategy, "_layer_sync", None) is not None:
        raise UnsupportedModelError(
            "Trainer(sync_batchnorm=True) replaces norm layers after they were wrapped. Write "
            "nn.SyncBatchNorm.convert_sync_batchnorm(model) where the LightningModule makes its model instead."
        )
    if getattr(module, "_compiler_ctx", None) is not None:
        raise UnsupportedModelError(
            "The LightningModule is compiled. Compile the model inside it instead: "
            "self.model = torch.compile(entprop.wrap(model))."
        )
    for other in trainer.callbacks:
        if _AVERAGING & {base.__name__ for base in type(other).__mro__}:
            raise UnsupportedModelError(
                f"{type(other).__name__} copies the LightningModule before it is wrapped, and would average parameters "
                "of different layers. Leave it out; entprop.Trainer averages weights (TrainerConfig(ema_decay=...))."
            )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise UnsupportedModelError("Expected training_step(batch, batch_idx), found one with dataloader_iter.")


def refuse_optimizers(optimizers: list[Any]) -> None:
    """Raise :class:`UnsupportedModelError` for optimizers that run the closure as often as they like."""
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise UnsupportedModelError(
            "LBFGS searches along lines of one fixed loss; every step of a method here draws another. Use SGD or AdamW."
        )


def find_classifier(module: Any, name: str | None) -> tuple[str, nn.Module]:
    """Return the name and the module that turns images into logits: an attribute, or ``"self"``.

    Raises:
        ConfigurationError: There is no such attribute, or none was named and none is obvious.
    """
    forward = is_overridden("forward", module)
    if name is None:
        name = "model" if isinstance(getattr(module, "model", None), nn.Module) else "self" if forward else None
    if name == "self" and forward:
        return name, module
    found = None if name in (None, "self") else dict(module.named_modules()).get(name)
    if found is None:
        children = ", ".join(repr(child) for child, _ in module.named_children()) or "none"
        wanted = {None: "no 'model' and no forward()", "self": "no forward()"}.get(name, f"no {name!r}")
        raise ConfigurationError(
            f"{type(module).__name__} has {wanted}; its parts are {children}. Write EntPropLightningCallback(..., "
            "model=) with the name of the part that turns images into logits, or 'self' for forward()."
        )
    return str(name), found


def read_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """Return images and labels.

    Raises:
        ConfigurationError: The batch is not ``(images, labels)`` and no dict with both and no other tensor.
    """
    if isinstance(batch, Mapping):
        images = [batch[name] for name in _IMAGES if name in batch]
        labels = [batch[name] for name in _LABELS if name in batch]
        others = [value for name, value in batch.items() if name not in _IMAGES + _LABELS]
        if len(images) == len(labels) == 1 and not any(isinstance(value, Tensor) and value.ndim for value in others):
            return images[0], labels[0]
        found = f"a dict with {', '.join(map(repr, batch))}"
    else:
        if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(item, Tensor) for item in batch):
            return batch[0], batch[1]
        found = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
    raise ConfigurationError(
        f"Expected batches (images, labels), or a dict with one of {', '.join(_IMAGES)} and one of "
        f"{', '.join(_LABELS)} as its tensors; found {found}. Images are mixed and selected, and nothing else in a "
        "batch can follow: leave it out in the data set, or in the module's on_after_batch_transfer."
    )


def batch_of(batch: Any, rows: int) -> Any:
    """Return the first rows of a batch that :func:`read_batch` accepts."""
    images, _ = read_batch(batch)
    if rows == len(images):
        return batch
    if isinstance(batch, Mapping):
        return {k: v[:rows] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}
    return type(batch)([item[:rows] for item in batch])
