"""What images a model takes, read from its image processor or its timm configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchvision.transforms.v2 import InterpolationMode

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError

__all__ = ["ImageFormat", "image_format"]

_PIL_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of PIL.Image.Resampling
_INSTEAD = "pass ImageFormat(size=(224, 224), resize=256, space=PixelSpace(mean, std)) instead"


@dataclass(frozen=True)
class ImageFormat:
    """The images a model takes.

    Attributes:
        size: Height and width into the model, pixels.
        resize: In evaluation, the short side before the central crop; ``(height, width)`` to change the aspect instead.
        space: What the model wants its images normalised with.
        interpolation: Of every resize.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    space: PixelSpace = PixelSpace()  # noqa: RUF009 - frozen, too
    interpolation: InterpolationMode = InterpolationMode.BILINEAR

    def __post_init__(self) -> None:
        sides = (*self.size, *(self.resize if isinstance(self.resize, tuple) else (self.resize,)))
        if len(self.size) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ConfigurationError(
                f"Expected positive numbers of pixels, found size={self.size}, resize={self.resize}."
            )
        if self.space.channels not in (None, 3):
            raise ConfigurationError(
                f"Expected mean and std of 3 channels, found {self.space}: images are always RGB, so another number "
                "of channels needs a transform of its own."
            )


def image_format(source: Any) -> ImageFormat:
    """Return the format that a Hugging Face image processor or a timm configuration describes.

    `eval_transform` of it does what the processor does (where an odd number of pixels is cropped away, the two may
    differ by one pixel in where they cut); for training take `train_transform` of it. Of timm, pass
    ``timm.data.resolve_model_data_config(model)``, ``model.pretrained_cfg`` or the model.

    Raises:
        ConfigurationError: No resize to a fixed size, or pixels that are not scaled RGB.
    """
    config = source if isinstance(source, Mapping) else getattr(source, "pretrained_cfg", None)
    if isinstance(config, Mapping):
        return _from_timm(config)
    if not getattr(source, "do_rescale", True) or getattr(source, "do_flip_channel_order", False):
        raise ConfigurationError(
            f"Expected a processor of RGB pixels with do_rescale=True, found {type(source).__name__} with another "
            f"scale or BGR: {_INSTEAD}."
        )
    resize, size = _sizes(source)
    filter_ = getattr(source, "resample", None)
    mode = InterpolationMode(_PIL_FILTERS[2 if filter_ is None else int(filter_)])
    return ImageFormat(size, resize, PixelSpace.from_processor(source), mode)


def _sizes(processor: Any) -> tuple[int | tuple[int, int], tuple[int, int]]:
    """Return the resize and the final (height, width)."""
    size, crop = _mapping(processor, "size"), _mapping(processor, "crop_size")
    crops = bool(getattr(processor, "do_center_crop", False) and crop)
    if not getattr(processor, "do_resize", True) or not ("shortest_edge" in size or {"height", "width"} <= set(size)):
        raise ConfigurationError(
            f"Expected a processor that resizes to 'shortest_edge' or to 'height' and 'width', found size={size}, "
            f"do_resize={getattr(processor, 'do_resize', True)}: {_INSTEAD}."
        )
    resize: int | tuple[int, int]
    if "shortest_edge" in size:
        resize, square = size["shortest_edge"], (size["shortest_edge"],) * 2
        fraction = getattr(processor, "crop_pct", None)
        if fraction and not crops and resize >= 384:
            resize = square  # ConvNeXT: no crop from 384 px on, the aspect changes instead
        elif fraction:
            resize = int(resize / fraction)
        elif type(processor).__name__.startswith("Levit"):
            resize = int(resize * 256 / 224)  # LeViT's `size` is that of the crop
    else:
        resize = square = (size["height"], size["width"])
    if not crops:
        return resize, square
    return resize, ((crop["height"], crop["width"]) if "height" in crop else (crop["shortest_edge"],) * 2)


def _from_timm(config: Mapping[str, Any]) -> ImageFormat:
    mode, channels = config.get("crop_mode") or "center", config["input_size"][0]
    if channels != 3 or mode not in ("center", "squash"):
        raise ConfigurationError(
            f"Expected 3 channels and crop_mode 'center' or 'squash', found input_size={config['input_size']}, "
            f"crop_mode={mode!r}: {_INSTEAD}."
        )
    height, width = (int(side) for side in config["input_size"][1:])
    fraction = config.get("crop_pct") or 0.875
    scaled = (int(height / fraction), int(width / fraction))
    name = config.get("interpolation") or "bilinear"
    return ImageFormat(
        (height, width),
        scaled if mode == "squash" or height != width else scaled[0],
        PixelSpace(config["mean"], config["std"]),
        InterpolationMode("bilinear" if name == "random" else name),
    )


def _mapping(processor: Any, name: str) -> dict[str, int]:
    """Return ``size`` or ``crop_size``: an int, a dict, or a dict-like object whose unused fields are None."""
    value = getattr(processor, name, None)
    if isinstance(value, int):
        return {"shortest_edge": value} if name == "size" else {"height": value, "width": value}
    return {key: side for key, side in dict(value or {}).items() if side is not None}
