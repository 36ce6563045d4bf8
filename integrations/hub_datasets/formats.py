"""The format of the images a model takes, read from its image processor or its timm configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL.Image import Resampling
from torchvision.transforms.v2 import InterpolationMode

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError

__all__ = ["ImageFormat", "image_format"]

_INSTEAD = "pass ImageFormat(size=(224, 224), resize=256, space=PixelSpace(mean, std)) instead"


@dataclass(frozen=True)
class ImageFormat:
    """The images a model takes.

    Attributes:
        size: Height and width into the model, pixels.
        resize: In evaluation, the short side before the central crop; ``(height, width)`` to change the aspect instead.
        space: What the model wants its images normalised with.
        interpolation: Interpolation of every resize.

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
            raise ConfigurationError(f"Expected mean and std of 3 channels (images are RGB), found {self.space}.")


def image_format(source: Any) -> ImageFormat:
    """Return the format that a Hugging Face image processor or a timm configuration describes.

    `eval_transform` of it does what the processor does, to within a pixel where an odd number is cropped away; for
    training take `train_transform` of it. For timm, pass ``timm.data.resolve_model_data_config(model)``,
    ``model.pretrained_cfg`` or the model.

    Raises:
        ConfigurationError: No resize to a fixed size, or pixels that are not scaled RGB.
    """
    config = source if isinstance(source, Mapping) else getattr(source, "pretrained_cfg", None)
    if isinstance(config, Mapping):
        return _from_timm(config)
    size, crop = _sides(source, "size"), _sides(source, "crop_size")
    crops = bool(getattr(source, "do_center_crop", False) and crop)
    expected = {"do_rescale": True, "do_flip_channel_order": False, "do_resize": True}
    other = {key: getattr(source, key) for key, value in expected.items() if getattr(source, key, value) != value}
    if other or not ("shortest_edge" in size or {"height", "width"} <= set(size)):
        raise ConfigurationError(
            "Expected a processor that rescales RGB pixels and resizes to 'shortest_edge' or to 'height' and 'width', "
            f"found {type(source).__name__} with size={size} {other or ''}: {_INSTEAD}."
        )
    resize: int | tuple[int, int]
    if "height" in size:
        resize = square = (size["height"], size["width"])
    else:
        resize, square = size["shortest_edge"], (size["shortest_edge"],) * 2
        fraction = getattr(source, "crop_pct", None)
        if fraction and not crops and resize >= 384:
            resize = square  # ConvNeXT: no crop from 384 px on, the aspect changes instead
        elif fraction:
            resize = int(resize / fraction)
        elif type(source).__name__.startswith("Levit"):
            resize = int(resize * 256 / 224)  # LeViT's `size` is that of the crop
    if crops:
        square = (crop["height"], crop["width"]) if "height" in crop else (crop["shortest_edge"],) * 2
    resample = getattr(source, "resample", None)
    mode = InterpolationMode(Resampling(2 if resample is None else int(resample)).name.lower())
    return ImageFormat(square, resize, PixelSpace.from_processor(source), mode)


def _from_timm(config: Mapping[str, Any]) -> ImageFormat:
    (channels, height, width), mode = config["input_size"], config.get("crop_mode") or "center"
    if channels != 3 or mode not in ("center", "squash"):
        raise ConfigurationError(
            f"Expected 3 channels and crop_mode 'center' or 'squash', found input_size={config['input_size']}, "
            f"crop_mode={mode!r}: {_INSTEAD}."
        )
    fraction = config.get("crop_pct") or 0.875
    scaled = (int(height / fraction), int(width / fraction))
    resize = scaled if mode == "squash" or height != width else scaled[0]
    name = config.get("interpolation") or "bilinear"
    mode = InterpolationMode("bilinear" if name == "random" else name)
    return ImageFormat((int(height), int(width)), resize, PixelSpace(config["mean"], config["std"]), mode)


def _sides(processor: Any, name: str) -> dict[str, int]:
    """Return ``size`` or ``crop_size``: an int, a dict, or a dict-like object whose unused fields are None."""
    value = getattr(processor, name, None)
    if isinstance(value, int):
        return {"shortest_edge": value} if name == "size" else {"height": value, "width": value}
    return {key: side for key, side in dict(value or {}).items() if side is not None}
