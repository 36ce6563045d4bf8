"""What images a model takes, read from its image processor or its timm configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchvision.transforms.v2 import InterpolationMode

from entprop_wrap.errors import ConfigurationError

__all__ = ["ImageFormat", "image_format"]

_PIL_FILTERS = {  # the numbers of PIL.Image.Resampling
    0: InterpolationMode.NEAREST,
    1: InterpolationMode.LANCZOS,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
    4: InterpolationMode.BOX,
    5: InterpolationMode.HAMMING,
}
_INSTEAD = "pass ImageFormat(size=(224, 224), resize=256, mean=..., std=...), in [0, 1] units, instead"


@dataclass(frozen=True)
class ImageFormat:
    """The images a model takes.

    Attributes:
        size: Height and width into the model, pixels.
        resize: In evaluation, the short side before the central crop; ``(height, width)`` to change the aspect instead.
        mean: Per channel, as a fraction of the pixel range, [0, 1]; None where pixels are not normalised.
        std: Per channel, likewise, in (0, 1].
        interpolation: Of every resize.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: InterpolationMode = InterpolationMode.BILINEAR

    def __post_init__(self) -> None:
        sides = (*self.size, *(self.resize if isinstance(self.resize, tuple) else (self.resize,)))
        if not all(isinstance(side, int) and side > 0 for side in sides):
            raise ConfigurationError(
                f"Expected positive numbers of pixels, found size={self.size}, resize={self.resize}."
            )
        if self.mean is None and self.std is None:
            return
        if self.mean is None or self.std is None or len(self.mean) != 3 or len(self.std) != 3:
            raise ConfigurationError(
                f"Expected mean and std of 3 channels, found mean={self.mean}, std={self.std}: images are always RGB, "
                "so a model of one channel needs a transform of its own."
            )
        if not all(0 <= value <= 1 for value in self.mean) or not all(0 < value <= 1 for value in self.std):
            raise ConfigurationError(
                f"Expected mean in [0, 1] and std in (0, 1], found mean={self.mean}, std={self.std}: values on the "
                "scale 0 to 255 have to be divided by 255."
            )


def image_format(source: Any) -> ImageFormat:
    """The format a Hugging Face image processor or a timm configuration describes.

    `eval_transform` of it does what the processor does (where an odd number of pixels is cropped away, the two may
    differ by one pixel in where they cut); for training take `train_transform` of it.

    Args:
        source: An image processor of `AutoImageProcessor`, torchvision ("fast") or PIL; or the mapping of timm's
            ``model.pretrained_cfg`` or ``timm.data.resolve_model_data_config(model)``.

    Raises:
        ConfigurationError: No resize to a fixed size, or pixels scaled otherwise than to RGB in [0, 1].
    """
    config = source if isinstance(source, Mapping) else getattr(source, "pretrained_cfg", None)
    if isinstance(config, Mapping):
        return _from_timm(config)
    _require_unit_rgb(source)
    resize, size = _sizes(source)
    mean = std = None
    if getattr(source, "do_normalize", False):
        mean, std = tuple(source.image_mean), tuple(source.image_std)
    filter_ = getattr(source, "resample", None)
    return ImageFormat(size, resize, mean, std, _PIL_FILTERS[2 if filter_ is None else int(filter_)])


def _sizes(processor: Any) -> tuple[int | tuple[int, int], tuple[int, int]]:
    """The resize and the final (height, width)."""
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
        tuple(config["mean"]),
        tuple(config["std"]),
        InterpolationMode.BILINEAR if name == "random" else InterpolationMode(name),
    )


def _mapping(processor: Any, name: str) -> dict[str, int]:
    """`size` and `crop_size` are ints, dicts, or dict-like objects whose unused fields are None."""
    value = getattr(processor, name, None)
    if isinstance(value, int):
        return {"shortest_edge": value} if name == "size" else {"height": value, "width": value}
    return {key: side for key, side in dict(value or {}).items() if side is not None}


def _require_unit_rgb(processor: Any) -> None:
    factor = getattr(processor, "rescale_factor", None) or 1 / 255
    problems = [
        f"do_rescale={getattr(processor, 'do_rescale', True)}" if not getattr(processor, "do_rescale", True) else "",
        f"rescale_factor={factor}" if abs(factor * 255 - 1) > 1e-3 else "",
        *(
            f"{name}=True" if getattr(processor, name, False) else ""
            for name in ("rescale_offset", "do_flip_channel_order")
        ),
    ]
    if any(problems):
        raise ConfigurationError(
            f"Expected a processor that scales RGB pixels to [0, 1], found {', '.join(filter(None, problems))} in "
            f"{type(processor).__name__}: {_INSTEAD}."
        )
