"""A batch of images and labels: the space its pixels live in, and what is checked before a step."""

from entprop_wrap.data.pixel_space import PixelSpace

__all__ = ["PixelSpace"]
