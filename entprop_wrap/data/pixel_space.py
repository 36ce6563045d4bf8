"""The relation of a batch of images to pixels in [0, 1]."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.utils.options import as_python, check_number, check_sequence, shown

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "mean": (lambda value: True, "in units of the pixel range"),
    "std": (lambda value: value > 0, "above 0"),
}


@dataclass(frozen=True)
class PixelSpace:
    """How a batch of images relates to pixels in [0, 1]: ``image = (pixel - mean) / std``, channel by channel.

    It belongs to the data, not to the model: say here what the data loader normalised with. Epsilons and step sizes are
    fractions of the full pixel range, whatever the normalisation, and valid pixels stay valid.

    Attributes:
        mean: One number, or one per channel, in units of the pixel range.
        std: Standard deviations in the same form, above 0.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value: Any = getattr(self, name)
            if not isinstance(as_python(value), (int, float)):
                what, example = "numbers, one per channel, or one number", f"{name}=(0.5, 0.5, 0.5)"
                value = check_sequence(name, value, what, example)
            values = value if isinstance(value, tuple) else (value,)
            object.__setattr__(self, name, tuple(float(check_number(name, v, *_RANGES[name])) for v in values))
        if max(self.std) > 1:
            raise ConfigurationError(f"mean={self.mean}, std={self.std} look like the 0-255 scale: divide both by 255.")
        if len({len(self.mean), len(self.std), 1}) > 2:
            raise ConfigurationError(
                f"mean has {len(self.mean)} channels and std {len(self.std)}. Write one number or one per channel."
            )

    @property
    def channels(self) -> int | None:
        """Number of channels, or None if one mean and one std serve any number."""
        most = max(len(self.mean), len(self.std))
        return None if most == 1 else most

    @classmethod
    def from_processor(cls, processor: Any) -> PixelSpace:
        """Read the space off a Hugging Face image processor: rescaling and normalisation, in its order.

        Raises:
            ConfigurationError: The processor does not say how it normalises, or quantises colours.
        """
        processor = getattr(processor, "image_processor", processor)  # a multimodal processor holds one
        kind = type(processor).__name__
        if isinstance(config := getattr(processor, "data_config", None), dict):
            return cls.from_timm(config)  # timm's own transforms, in transformers' TimmWrapperImageProcessor
        if getattr(processor, "do_color_quantize", False):
            raise ConfigurationError(f"{kind} turns pixels into colour indices, which have no gradient.")
        if not any(hasattr(processor, name) for name in ("do_rescale", "image_mean")):
            raise ConfigurationError(
                f"{kind} is not an image processor that says how it normalises. Write PixelSpace(mean=..., std=...)."
            )
        scale, shift, rescales = 255.0, 0.0, getattr(processor, "do_rescale", True)
        if rescales:
            scale = 255 * (getattr(processor, "rescale_factor", None) or 1 / 255)
            shift = -1.0 if any(getattr(processor, name, False) for name in ("rescale_offset", "offset")) else 0.0
        mean: tuple[float, ...] = (0.0,)
        std: tuple[float, ...] = (1.0,)
        if getattr(processor, "do_normalize", False):
            mean, std = (_per_channel(getattr(processor, name, None)) for name in ("image_mean", "image_std"))
            if not mean or not std:
                raise ConfigurationError(
                    f"{kind} normalises, but has image_mean={getattr(processor, 'image_mean', None)} and image_std="
                    f"{getattr(processor, 'image_std', None)}. Write PixelSpace(mean=..., std=...)."
                )
        if getattr(processor, "do_flip_channel_order", False) or kind.startswith("PPLCNet"):
            mean, std = mean[::-1], std[::-1]  # RGB becomes BGR after all else; PP-LCNet has no option that says so
        if getattr(processor, "include_top", False):  # EfficientNet divides by image_std, again or for the first time
            again = _per_channel(processor.image_std)
            most = max(len(std), len(again))
            std = tuple(s * a for s, a in zip(std * (most // len(std)), again * (most // len(again)), strict=True))
        return cls(tuple((m - shift) / scale for m in mean), tuple(s / scale for s in std))

    @classmethod
    def from_timm(cls, model: Any) -> PixelSpace:
        """Read the space off a timm model, or off its ``pretrained_cfg`` or a resolved data config.

        Raises:
            ConfigurationError: There is no ``mean`` and ``std`` to read.
        """
        config = getattr(model, "pretrained_cfg", model)
        config = config.to_dict() if hasattr(config, "to_dict") and not isinstance(config, type) else config
        if not isinstance(config, dict) or not all(name in config for name in ("mean", "std")):
            raise ConfigurationError(
                f"{type(model).__name__} has no pretrained_cfg with mean and std. Write PixelSpace(mean=..., std=...)."
            )
        return cls(config["mean"], config["std"])

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images of pixel 0 and of pixel 1, as ``(1, C, 1, 1)`` on the device of ``like``."""
        lower, upper, _ = self._constants(like.device, like.dtype)
        return lower, upper

    def bounds_around(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return how far each value of ``images`` may go: to valid pixels, and no further out where it is outside."""
        lower, upper = self.bounds(images)
        return torch.minimum(lower, images), torch.maximum(upper, images)

    def scale(self, like: Tensor) -> Tensor:
        """Return what the full pixel range is in these images, as ``(1, C, 1, 1)``: multiply an epsilon by it."""
        return self._constants(like.device, like.dtype)[2]

    def to_pixels(self, images: Tensor) -> Tensor:
        """Return images ``(N, C, H, W)`` as pixels, at least float32, clamped to [0, 1]: interpolation overshoots."""
        wide = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
        return ((wide - self.bounds(wide)[0]) / self.scale(wide)).clamp_(0, 1)

    def to_images(self, pixels: Tensor) -> Tensor:
        """Return pixels ``(N, C, H, W)`` in [0, 1] as images of this space."""
        return pixels * self.scale(pixels) + self.bounds(pixels)[0]

    @functools.lru_cache(maxsize=64)  # noqa: B019 - a few spaces and devices; saves a copy to the device in every step
    def _constants(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        with torch.inference_mode(False):  # what is made in inference mode cannot be used in training, and this is kept
            mean, std = (
                torch.tensor(v, dtype=torch.float64, device="cpu").view(1, -1, 1, 1) for v in (self.mean, self.std)
            )
            lower, upper, scale = (v.to(dtype).to(device) for v in ((0 - mean) / std, (1 - mean) / std, 1 / std))
        return lower, upper, scale


def space_of(pixel_space: object) -> PixelSpace:
    """Return what the option ``pixel_space`` names; None: images are in [0, 1]."""
    if pixel_space is None:
        return PixelSpace()
    if not isinstance(pixel_space, PixelSpace):
        raise ConfigurationError(
            f"pixel_space must be a PixelSpace or None, found {shown(pixel_space)}. Write PixelSpace(mean, std)."
        )
    return pixel_space


def _per_channel(value: Any) -> tuple[float, ...]:
    if value is None:
        return ()
    return (float(value),) if isinstance(value, (int, float)) else tuple(value)
