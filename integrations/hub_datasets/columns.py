"""Which column of a dataset holds the images, and which the labels: by type, or by usual names."""

from collections.abc import Sequence
from typing import Any

import datasets

from entprop_wrap.errors import DataError

_IMAGE_NAMES = (
    "image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp", "pixel_values",
    "image_path", "image_file_path", "img_path", "file_path", "filepath", "file_name", "filename", "path",
)  # fmt: skip
_LABEL_NAMES = (
    "label", "labels", "target", "targets", "class", "classes", "cls", "category", "label_id", "class_id",
    "class_label", "class_name", "label_name", "category_id", "y",
)  # fmt: skip


def find_image_column(features: datasets.Features, named: str | None = None) -> str:
    """Return the column the user names, else that of type `datasets.Image`, else paths or bytes under a usual name."""
    possible = [name for name, feature in features.items() if _may_hold_image(feature)]
    typed = [name for name in possible if isinstance(features[name], datasets.Image)]
    usual = [name for name in possible if name.lower() in _IMAGE_NAMES]
    found = typed or usual if named is None else [name for name in possible if name == named]
    return _only(found, features, "image", "images, paths or bytes", named)


def find_label_column(features: datasets.Features, named: str | None = None) -> str:
    """Return the column the user names, else the only one of type `datasets.ClassLabel` or under a usual name."""
    possible = [name for name, feature in features.items() if _is_label(feature)]
    typed = [name for name in possible if isinstance(features[name], datasets.ClassLabel)]
    usual = [name for name in possible if name.lower() in _LABEL_NAMES]
    found = [name for name in typed if name in usual] or [*typed, *usual]
    if named is not None:
        found = [name for name in possible if name == named]
    return _only(found, features, "label", "one class per image: text, integers or ClassLabel", named)


def _only(found: Sequence[str], features: datasets.Features, what: str, kinds: str, named: str | None) -> str:
    """Return the only one found, or that called ``what``."""
    for best in ([name for name in found if name.lower() == what], found):
        if len(best) == 1:
            return best[0]
    types = {n: str(f.dtype) if isinstance(f, datasets.Value) else type(f).__name__ for n, f in features.items()}
    columns = ", ".join(f"{name!r} ({kind})" for name, kind in types.items())
    choices = " or ".join(f"{what}_column={name!r}" for name in found) or f"another {what}_column=..."
    given = "" if named is None else f" in {what}_column={named!r}"
    raise DataError(f"Expected a column of {what}s ({kinds}){given}, found columns {columns}: pass {choices}.")


def _may_hold_image(feature: Any) -> bool:
    text = ("string", "large_string", "binary", "large_binary")
    cell = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
    return cell or isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in text


def _is_label(feature: Any) -> bool:
    kinds = ("string", "large_string", "int", "uint", "bool", "null")
    return isinstance(feature, (datasets.ClassLabel, datasets.Value)) and str(feature.dtype).startswith(kinds)
