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
    if named is not None:
        if not _may_hold_image(_feature(features, named, "image")):
            raise DataError(f"Expected images, paths or bytes in image_column={named!r}, found {_columns(features)}.")
        return named
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    usual = [name for name, feature in features.items() if name.lower() in _IMAGE_NAMES and _may_hold_image(feature)]
    return _only(typed or usual, features, "image", _IMAGE_NAMES)


def find_label_column(features: datasets.Features, named: str | None = None) -> str:
    """Return the column the user names, else that of type `datasets.ClassLabel`, else one under a usual name."""
    name = named
    if name is None:
        typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        usual = [name for name in features if name.lower() in _LABEL_NAMES]
        usual = [name for name in usual if not isinstance(features[name], datasets.Image)]
        if len(typed) == 1 and typed[0] not in usual:  # `domain` or `label`? not ours to guess
            typed += [name for name in usual if _is_label(features[name])]
            name = _only(typed, features, "label", ())
        else:
            name = _only(typed or usual, features, "label", _LABEL_NAMES)
    feature = _feature(features, name, "label")
    if isinstance(feature, (list, dict)) or hasattr(feature, "feature"):
        raise DataError(
            f"Expected one class per image in column {name!r}, found {_type(feature)}: multi-label data is not "
            "supported; keep the images of one label, as a column of integers or text."
        )
    if not _is_label(feature):
        raise DataError(
            f"Expected classes (text, integers or ClassLabel) in column {name!r}, found {_type(feature)}: pass "
            f"label_column=... with one of {_columns(features)}."
        )
    return name


def _only(found: list[str], features: datasets.Features, what: str, usual: tuple[str, ...]) -> str:
    """Return the only one found, or that with the plainest name."""
    known = [name for name in found if name.lower() in usual]
    plain = [name for name in known if name.lower() == what]
    for best in ([name for name in plain if name == what], plain, known, found):
        if len(best) == 1:
            return best[0]
    if not found:
        raise DataError(f"Expected a column of {what}s, found {_columns(features)}: pass {what}_column=... to name it.")
    choices = " or ".join(f"{what}_column={name!r}" for name in found)
    raise DataError(f"Expected one column of {what}s, found several in {_columns(features)}: pass {choices}.")


def _feature(features: datasets.Features, name: str, what: str) -> Any:
    if name not in features:
        raise DataError(f"Expected the column {what}_column={name!r}, found {_columns(features)}.")
    return features[name]


def _may_hold_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    text = ("string", "large_string", "binary", "large_binary")
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in text


def _is_label(feature: Any) -> bool:
    kinds = ("string", "large_string", "int", "uint", "bool", "null")
    return isinstance(feature, (datasets.ClassLabel, datasets.Value)) and str(feature.dtype).startswith(kinds)


def _type(feature: Any) -> str:
    return str(feature.dtype) if isinstance(feature, datasets.Value) else type(feature).__name__


def _columns(features: datasets.Features) -> str:
    return "columns " + ", ".join(f"{name!r} ({_type(feature)})" for name, feature in features.items())
