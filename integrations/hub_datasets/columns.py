"""Which column of a dataset holds the images, and which the labels: by type first, then by usual names."""

from typing import Any

import datasets

from entprop_wrap.errors import DataError

__all__ = ["find_image_column", "find_label_column"]

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
    if named is None:
        typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        usual = [name for name in features if name.lower() in _IMAGE_NAMES and _may_hold_image(features[name])]
        return _only(typed or usual, features, "image", _IMAGE_NAMES)
    if not _may_hold_image(features.get(named)):
        raise DataError(f"Expected images, paths or bytes in image_column={named!r}, found {_columns(features)}.")
    return named


def find_label_column(features: datasets.Features, named: str | None = None) -> str:
    """Return the column the user names, else that of type `datasets.ClassLabel`, else one under a usual name."""
    if named is None:
        typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        usual = [name for name in features if name.lower() in _LABEL_NAMES]
        usual = [name for name in usual if not isinstance(features[name], datasets.Image)]
        if len(typed) == 1 and typed[0] not in usual:  # `domain` or `label`? not ours to guess
            named = _only(typed + [name for name in usual if _is_label(features[name])], features, "label", ())
        else:
            named = _only(typed or usual, features, "label", _LABEL_NAMES)
    if not _is_label(features.get(named)):
        raise DataError(
            f"Expected one class per image (text, integers or ClassLabel) in label_column={named!r}, found "
            f"{_columns(features)}: name another column. Multi-label data is not supported."
        )
    return named


def _only(found: list[str], features: datasets.Features, what: str, usual: tuple[str, ...]) -> str:
    """Return the only one found, or that with the plainest name."""
    known = [name for name in found if name.lower() in usual]
    for best in ([name for name in known if name.lower() == what], known, found):
        if len(best) == 1:
            return best[0]
    choices = " or ".join(f"{what}_column={name!r}" for name in found) or f"{what}_column=... to name it"
    raise DataError(f"Expected a column of {what}s, found {_columns(features)}: pass {choices}.")


def _may_hold_image(feature: Any) -> bool:
    text = ("string", "large_string", "binary", "large_binary")
    cell = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
    return cell or isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in text


def _is_label(feature: Any) -> bool:
    kinds = ("string", "large_string", "int", "uint", "bool", "null")
    return isinstance(feature, (datasets.ClassLabel, datasets.Value)) and str(feature.dtype).startswith(kinds)


def _columns(features: datasets.Features) -> str:
    types = {
        name: str(one.dtype) if isinstance(one, datasets.Value) else type(one).__name__
        for name, one in features.items()
    }
    return "columns " + ", ".join(f"{name!r} ({kind})" for name, kind in types.items())
