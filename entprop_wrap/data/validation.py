"""Checks of batches: shapes and types in every step, values where looking costs no device sync."""

from __future__ import annotations

import inspect
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import (
    DivergedError,
    EntPropError,
    ImageError,
    LabelError,
    PixelRangeError,
    UnsupportedModelError,
)
from entprop_wrap.utils.optimizer_steps import Watch

#: The label that losses of torch ignore.
_IGNORED = -100

#: Interpolation without clamping overshoots valid pixels; further out than this, in pixel units, is another space.
_TOLERANCE = 0.25

#: Random erasing fills boxes with N(0, 1) after normalising; no number of it is further out than this.
_NOISE = 8.0


def check_images(images: Any, space: PixelSpace, *, half: bool = False) -> None:
    """Check that a batch is a floating ``(N, C, H, W)`` tensor that fits ``space``; ``half`` precision is refused."""
    if not isinstance(images, Tensor):
        raise ImageError(f"Expected images as a tensor (N, C, H, W), found {type(images).__name__}.")
    check_dense("images", images, ImageError)
    shape = tuple(images.shape)
    if not images.is_floating_point():
        raise ImageError(
            f"Expected floating-point images, found {images.dtype}. Write images.float() / 255, or let the data loader "
            "do it: torchvision.transforms.v2.ToDtype(torch.float32, scale=True)."
        )
    if images.dtype in (torch.float16, torch.bfloat16) and not half:
        raise ImageError(
            f"Expected float32 images, found {images.dtype}: a step of 1/255 is lost in their rounding. For speed use "
            "autocast (mixed_precision='bf16'), which casts inside the model."
        )
    if images.ndim != 4:
        raise ImageError(f"Expected images of shape (N, C, H, W), found {shape}. For one image write images[None].")
    if shape[-1] in (1, 3, 4) and shape[1] not in (1, 3, 4):
        raise ImageError(f"Found images of shape {shape}, which looks like NHWC. Write images.permute(0, 3, 1, 2).")
    if space.channels not in (None, shape[1]):
        raise ImageError(f"Found {shape[1]} channels; pixel_space has a mean and std for {space.channels}.")
    if 0 in shape:
        raise ImageError(f"Expected at least one image, found an empty batch of shape {shape}.")


def check_dense(name: str, tensor: Tensor, error: type[EntPropError]) -> None:
    """Raise ``error`` if ``tensor`` is sparse, or on the meta device, where tensors have no values."""
    if tensor.is_meta or tensor.layout != torch.strided:
        raise error(f"Expected {name} as a dense tensor with data, found {tensor.layout} on {tensor.device}.")


def check_takes_images(model: nn.Module) -> None:
    """Raise :class:`UnsupportedModelError` if a Hugging Face ``model`` does not take images ``(N, C, H, W)`` alone."""
    name = getattr(model, "main_input_name", None)
    if name == "input_ids":
        raise UnsupportedModelError(
            f"{type(model).__name__} takes {name}, which have no gradient. Expected a model of images (N, C, H, W)."
        )
    if name == "pixel_values" and "spatial_shapes" in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes patches of images of several sizes, which cannot be mixed. Expected a "
            "model of images (N, C, H, W), such as SiglipForImageClassification."
        )


def check_batch_size(images: Tensor) -> None:
    """Raise :class:`ImageError` if a training batch holds a single image."""
    if len(images) < 2:
        raise ImageError(
            f"Expected a batch of at least 2 images, found {len(images)}. Choose another batch size, or drop the last "
            "batch: DataLoader(..., drop_last=True), or TrainingArguments(dataloader_drop_last=True), which leaves out "
            "evaluation images, too."
        )


def check_labels(labels: Any, images: Tensor) -> Tensor:
    """Check type, shape and device of labels; return them as int64 ``(N,)`` or floating ``(N, C)``."""
    if not isinstance(labels, Tensor):
        raise LabelError(f"Expected labels as a tensor, found {type(labels).__name__}.")
    check_dense("labels", labels, LabelError)
    if labels.device != images.device:
        raise LabelError(f"Labels are on {labels.device}, images on {images.device}: write labels.to(images.device).")
    shape, batch = tuple(labels.shape), len(images)
    if labels.is_floating_point():
        if labels.ndim != 2 or shape[0] != batch:
            raise LabelError(
                f"Floating-point labels are probabilities ({batch}, C), found shape {shape}. For class indices write "
                "labels.long(); for a model with one logit labels[:, None]."
            )
        return labels
    if labels.dtype == torch.bool or labels.is_complex():
        raise LabelError(f"Expected integer class indices or floating-point probabilities, found {labels.dtype}.")
    if shape != (batch,):
        raise LabelError(
            f"Expected {batch} class indices ({batch},), one per image; found shape {shape}. If labels are one-hot, "
            "write labels.float() for probabilities, or labels.argmax(1) for indices."
        )
    return labels.long()


class Checker:
    """Checks the values of batches for one model.

    On the CPU every batch is checked, before anything changes. On an accelerator the first batch is; after that flags
    gather on the device, and :meth:`raise_pending` raises when somebody looks at the numbers anyway.
    """

    def __init__(self) -> None:
        self.first = True  # until images have fitted their space: what lies outside later is noise
        self.warned = False  # of too small auxiliary batches, on a model without copies
        self.classes: int | None = None  # known after the first pass
        self.loss: object = None  # of the last step
        self.loss_seen = False  # whether it is known to be a mean over images
        self.mixing_seen = False  # whether it was checked that labels are not those of mixed images
        self.stepped = False  # whether a training step has come to its end
        self.space_told = False  # whether images that may be in another space were warned of
        self.whole: str | None = None  # a layer that needs whole batches; "" if there is none
        self.pending: dict[str, tuple[type[EntPropError], Tensor]] = {}
        self.watch = Watch()

    def begin_with(self, loss: object) -> None:
        """Begin a step with a loss; another one than before is looked at anew, and so is what it trains."""
        if loss is not self.loss:
            self.loss, self.loss_seen, self.classes = loss, False, None

    def images(self, images: Tensor, space: PixelSpace) -> None:
        """Check that images are finite and lie in ``space``, but for noise that random erasing left in some."""
        lower, upper = space.bounds(images)
        slack = _TOLERANCE * space.scale(images)
        if images.device.type == "cpu" or self.first:
            # One pass over the data: the extremes of each channel also carry NaN and infinity.
            low, high = torch.aminmax(images.detach().transpose(0, 1).flatten(1), dim=1)
            inside = bool(((low >= (lower - slack).flatten()) & (high <= (upper + slack).flatten())).all())
            if not inside and not self._erased(images.detach(), lower, upper, slack):
                raise _image_problem(low, high, lower, upper)
            if not self.space_told:
                _warn_of_space(float(low.min()), float(high.max()), float(lower.max()), float(upper.max()), space)
            self.first, self.space_told = False, True
        else:
            good = self._mostly_inside(images.detach(), lower, upper, slack)
            self._note("images outside the pixel space, or not finite", ~good, PixelRangeError)

    def _erased(self, images: Tensor, lower: Tensor, upper: Tensor, slack: Tensor) -> bool:
        """Return whether what lies outside the pixel space is noise in some images, rather than another space."""
        inside = (images >= lower - slack) & (images <= upper + slack)
        few = bool((~inside).float().mean() <= 0.002) or bool(inside.flatten(1).all(dim=1).float().mean() >= 0.5)
        return (not self.first or few) and bool(self._mostly_inside(images, lower, upper, slack))

    def _mostly_inside(self, images: Tensor, lower: Tensor, upper: Tensor, slack: Tensor) -> Tensor:
        inside = (images >= lower - slack) & (images <= upper + slack)
        near = (images >= lower - _NOISE) & (images <= upper + _NOISE)
        return near.all() & (inside.float().mean() > 0.5)

    def check_takes_parts(self, model: nn.Module) -> None:
        """Raise :class:`UnsupportedModelError` if a layer knows the images of a batch by their places in it."""
        if self.whole is None:
            kinds = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
            self.whole = next((kind for kind in kinds if kind.startswith("SplitBatchNorm")), "")
        if self.whole:
            raise UnsupportedModelError(
                f"{self.whole} normalises each split of a batch apart, and the method passes selected images. Expected "
                "a model without: leave out --split-bn (convert_splitbn_model), wrap() makes the auxiliary norms."
            )

    def labels(self, labels: Tensor, classes: int, *, probabilities: bool = True) -> None:
        """Check that labels fit ``classes`` logits; floating ones need not be ``probabilities`` of one class."""
        if labels.is_floating_point():
            if labels.shape[1] != classes:
                raise LabelError(f"Found soft labels for {labels.shape[1]} classes; the model has {classes} logits.")
            if probabilities:
                bad = (labels < 0).any() | ~((labels.sum(dim=1) - 1).abs() <= 1e-2).all()
                message = (
                    "Soft labels must be probabilities: at least 0, and each row with sum 1. For several classes an "
                    "image pass a binary loss, loss=torch.nn.BCEWithLogitsLoss()."
                )
            else:
                bad = ~((labels >= 0) & (labels <= 1)).all()
                message = "Floating-point labels must be in [0, 1]."
        else:
            classes = max(classes, 2)  # one logit is for two
            bad = ((labels < 0) | (labels >= classes)).any()
            message = f"Class indices must be in [0, {classes - 1}] for a model with {classes} logits"
        if labels.device.type != "cpu":
            self._note(message, bad, LabelError)
        elif bool(bad):
            if not labels.is_floating_point():
                message += f"; found [{int(labels.min())}, {int(labels.max())}]. " + (
                    "Images without a label (ignore_index) cannot be mixed: leave them out of the data."
                    if int(labels.min()) == _IGNORED
                    else "Give the model as many outputs as there are classes, and make labels start at 0."
                )
            raise LabelError(message)

    def raise_pending(self) -> None:
        """Raise what the device has found since the last call; this waits for the device."""
        pending, self.pending = self.pending, {}
        diverged, self.watch.diverged = self.watch.diverged, None
        if diverged is not None:
            pending["its loss was not finite"] = DivergedError, diverged
        for message, (error, flag) in pending.items():
            if bool(flag):
                raise error(
                    f"A batch since the last look at the metrics was wrong: {message}. Go back to the last "
                    "checkpoint, and run on the CPU to have each batch checked before its step."
                )

    def _note(self, message: str, flag: Tensor, error: type[EntPropError]) -> None:
        earlier = self.pending.get(message)
        self.pending[message] = error, flag if earlier is None else flag | earlier[1]


_checkers: weakref.WeakKeyDictionary[nn.Module, Checker] = weakref.WeakKeyDictionary()


def checker_of(model: nn.Module) -> Checker:
    """Return the checker of a model, made on first use and gone with the model."""
    return _checkers.setdefault(model, Checker())


def check_evaluated(images: Any, labels: Any, space: PixelSpace, *, first: bool = False) -> Tensor:
    """Check a batch that a model is evaluated on; return its class indices as int64 ``(N,)``.

    On the ``first`` batch, also check that it does not look as if it were in [0, 1] where ``space`` says otherwise.
    """
    check_images(images, space, half=True)
    wide = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
    if first:
        low, high = (float(value) for value in torch.aminmax(wide))
        # Natural images do not fill [0, 1] so exactly once they are normalised.
        if 0 <= low < 0.02 and 0.98 < high <= 1 and float(space.bounds(wide)[0].max()) <= -0.5:
            raise PixelRangeError(
                f"The first batch spans [{low:.2f}, {high:.2f}], which is pixels in [0, 1], but pixel_space={space} "
                "says that images are normalised. Leave pixel_space out, or normalise in the data loader."
            )
    checker = Checker()
    checker.space_told = not first
    checker.images(wide, space)
    if isinstance(labels, Tensor) and not labels.is_meta:
        labels = labels.to(images.device)
        if labels.is_floating_point():
            raise LabelError(
                f"Expected one class index for each image, found {labels.dtype} labels {tuple(labels.shape)}. Write "
                "labels.long().flatten(), or if they are probabilities labels.argmax(1), or leave MixUp out."
            )
    return check_labels(labels, images)


def _warn_of_space(smallest: float, largest: float, lower: float, upper: float, space: PixelSpace) -> None:
    span = f"The first batch spans [{smallest:.2f}, {largest:.2f}], "
    if smallest >= 0 and largest <= 1 and lower <= -0.5:
        warnings.warn(
            f"{span}which looks like pixels in [0, 1], but pixel_space={space} says that images are normalised. If "
            "they are not, leave pixel_space out.",
            stacklevel=6,
        )
    if upper > 50 and largest < upper / 50:
        warnings.warn(
            f"{span}next to nothing of [{lower:.0f}, {upper:.0f}], the range of pixel_space={space}. If the image "
            "processor has do_rescale=False because pixels come to it in [0, 1], write PixelSpace(image_mean, "
            "image_std).",
            stacklevel=6,
        )


def _image_problem(low: Tensor, high: Tensor, lower: Tensor, upper: Tensor) -> EntPropError:
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        return ImageError("Found images that are not finite (NaN or infinity). Look at the data or its augmentation.")
    smallest, largest = float(low.min()), float(high.max())
    if largest > 50:
        hint = "It looks like 0-255: divide by 255, or pass pixel_space=PixelSpace(mean=0, std=1/255)."
    elif smallest < 0:
        hint = (
            "It looks normalised: pass pixel_space=PixelSpace(mean, std). If you do, and random erasing fills images "
            "with noise: erase with a constant (timm: --remode const), or before normalising."
        )
    else:
        hint = "Clamp it to valid pixels."
    return PixelRangeError(
        f"This batch spans [{smallest:.2f}, {largest:.2f}]; pixel_space allows [{float(lower.min()):.2f}, "
        f"{float(upper.max()):.2f}]. {hint}"
    )
