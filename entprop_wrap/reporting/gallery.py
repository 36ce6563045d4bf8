"""Example images under each corruption, as PNG inside the page."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.data.validation import check_evaluated, check_images
from entprop_wrap.errors import ImageError
from entprop_wrap.robustness import SUITES, RobustnessResult, corrupt

#: Larger images are shrunk to this side, so that a page with 60 of them stays a few megabytes.
_LARGEST = 128


def gallery_of(images: Any, space: PixelSpace, result: RobustnessResult) -> tuple[list[dict[str, Any]], str]:
    """Return each corruption's pictures, of up to three severities, and at what size they were made."""
    check_images(images, space, half=True)
    check_evaluated(images, torch.zeros(len(images), dtype=torch.int64), space, first=True)
    if images.shape[1] != 3:
        raise ImageError(f"images must have 3 channels to be shown, found {images.shape[1]}.")
    pixels = space.to_pixels(images.detach().cpu())
    severities = result.severities
    if len(severities) > 3:
        severities = (severities[0], severities[len(severities) // 2], severities[-1])
    rows = []
    known = [name for name in result.corruptions if any(name in suite for suite in SUITES.values())]
    for number, name in enumerate(known):
        example, shown = pixels[number % len(pixels)][None], name.replace("_", " ")
        pictures = [_picture(example, f"Example without {shown}", "as it is")]
        for severity in severities:
            changed = corrupt(example, name, severity, torch.Generator().manual_seed(result.seed))
            pictures.append(_picture(changed, f"{shown}, severity {severity}", str(severity)))
        rows.append({"name": shown, "pictures": pictures})
    height, width = pixels.shape[-2:]
    shrunk = f", shown at {_LARGEST} px" if max(height, width) > _LARGEST else ""
    return rows, f"{width} x {height} px{shrunk}"


def _picture(pixels: Tensor, alt: str, words: str) -> dict[str, Any]:
    image = Image.fromarray(pixels[0].mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())
    small = max(image.size) < 64
    image.thumbnail((_LARGEST, _LARGEST))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"source": source, "alt": alt, "words": words, "width": image.width, "height": image.height, "small": small}
