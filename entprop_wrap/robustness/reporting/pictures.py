"""Example images under corruptions, as PNG inside the page; the encoder is a few lines, so nothing is needed for it."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from entprop_wrap.errors import ImageError
from entprop_wrap.perturbation import PixelSpace
from entprop_wrap.robustness.corruptions import corrupt
from entprop_wrap.robustness.pixels import check_batch, to_pixels
from entprop_wrap.robustness.reporting.markup import Markup, table, tag
from entprop_wrap.robustness.reporting.wording import name_of

__all__ = ["png", "strips"]

#: Larger images are shrunk, so that a page with 60 of them stays a few megabytes.
_LARGEST = 128


def strips(images: Tensor, space: PixelSpace, conditions: Iterable[tuple[str, int]], seed: int) -> tuple[Markup, str]:
    """Return a row for each corruption: an image as it is, and under up to three severities; and what is to be said.

    Args:
        images: ``(N, 3, H, W)`` in ``space``; rows take turns.
        space: Pixel space of the images.
        conditions: What was evaluated.
        seed: Of the corruptions.

    Raises:
        ImageError: Images of another type or shape, or too small for corruptions.
        PixelRangeError: Images that do not lie in ``space``.
    """
    if not isinstance(images, Tensor):
        raise ImageError(f"images must be a tensor (N, 3, H, W), found {type(images).__name__}.")
    check_batch(images, torch.zeros(len(images) if images.ndim else 0, dtype=torch.int64), space, first=True)
    pixels = to_pixels(images.detach().cpu(), space)
    listed = list(conditions)
    severities = list(dict.fromkeys(severity for _, severity in listed))
    if len(severities) > 3:
        severities = [severities[0], severities[len(severities) // 2], severities[-1]]
    rows: list[list[str]] = []
    for number, name in enumerate(dict.fromkeys(name for name, _ in listed)):
        picture = pixels[number % len(pixels)][None]
        cells = [_cell(picture[0], "as it is")]
        for severity in severities:
            changed = corrupt(picture, name, severity, torch.Generator().manual_seed(seed))
            cells.append(_cell(changed[0], f"{name_of(name)}, severity {severity}"))
        rows.append([name_of(name), *cells])
    head = ["", "as it is", *(f"severity {one}" for one in severities)]
    half = (len(rows) + 1) // 2 if len(rows) > 3 else len(rows)
    parts = [rows[:half], rows[half:]] if rows[half:] else [rows]
    found = [table("Examples", head, part, kind="pictures quiet") for part in parts]
    height, width = pixels.shape[-2:]
    shrunk = f", shown at {_LARGEST} px" if max(height, width) > _LARGEST else ""
    note = f"Corrupted at the size that the model sees, {width} x {height} px{shrunk}."
    return tag("div", *found, class_="maps"), note


def png(pixels: Tensor) -> bytes:
    """Return ``(3, H, W)`` in [0, 1] as an 8-bit RGB file of the PNG format (ISO/IEC 15948)."""
    values = pixels.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous()
    height, width, _ = values.shape
    # Each line says how it is filtered; 2 is "difference to the line above", which compresses photographs well.
    above = torch.cat([values.new_zeros(1, width, 3), values[:-1]])
    differences = (values.int() - above.int()).remainder(256).byte().view(height, -1)
    lines = torch.cat([differences.new_full((height, 1), 2), differences], 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.numpy().tobytes(), 9)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def _cell(pixels: Tensor, alt: str) -> Markup:
    side = max(pixels.shape[-2:])
    if side > _LARGEST:
        size = [max(1, round(length * _LARGEST / side)) for length in pixels.shape[-2:]]
        pixels = torch.nn.functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
    source = "data:image/png;base64," + base64.b64encode(png(pixels)).decode()
    height, width = pixels.shape[-2:]
    kind = "small" if side < 64 else "photo"
    return tag("td", tag("img", src=source, alt=alt, width=width, height=height, class_=kind))
