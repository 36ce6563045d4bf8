"""Which column of a data set holds the images, and which the labels: by type first, then by usual names."""

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
_NO_LABELS = (  # columns of text that are something else
    *_IMAGE_NAMES, "__key__", "__url__", "__index_level_0__", "alt", "alt_text", "answer", "caption", "captions",
    "comment", "description", "hash", "id", "idx", "image_id", "image_name", "image_url", "index", "key", "md5",
    "name", "prompt", "query", "question", "source", "split", "text", "title", "url", "uuid",
)  # fmt: skip


def find_image_column(features: datasets.Features, named: str | None = None) -> str:
    """The column of the images.

    A column of type `datasets.Image` is preferred; else strings, bytes or ``{"bytes", "path"}`` under a usual name, in
    small or capital letters.

    Args:
        features: The columns and their types.
        named: The column the user names; it only has to exist and to be of one of these types.

    Raises:
        DataError: No such column, or several.
    """
    if named is not None:
        _require(features, named, "image_column")
        if not (_is_image(features[named]) or _may_hold_image(features[named])):
            raise DataError(f"Expected images, paths or bytes in image_column={named!r}, found {_columns(features)}.")
        return named
    typed = [name for name, feature in features.items() if _is_image(feature)]
    usual = [name for name in _among(features, _IMAGE_NAMES) if _may_hold_image(features[name])]
    return _only(typed or usual, _IMAGE_NAMES, features, "image")


def find_label_column(features: datasets.Features, named: str | None, notes: list[str]) -> str:
    """The column of the labels: one class per image, as text, an integer or a `datasets.ClassLabel`.

    A ClassLabel is preferred; else a usual name, in small or capital letters; else text, where no other column can
    be the labels.

    Args:
        features: The columns and their types.
        named: The column the user names; it only has to exist and to hold one class per image.
        notes: Gets a sentence where a column was taken for want of another.

    Raises:
        DataError: No such column, several, or one that holds several labels per image or numbers with a fraction.
    """
    if named is not None:
        _require(features, named, "label_column")
        _require_one_class(features, named)
        return named
    typed = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in _among(features, _LABEL_NAMES) if not _is_image(features[name])]
    if len(typed) == 1 and typed[0] not in usual and any(_is_label(features[name]) for name in usual):
        typed += [name for name in usual if _is_label(features[name])]  # `domain` or `label`? not ours to guess
        raise DataError(_ambiguous(typed, features, "label"))
    if not typed and not usual:
        others: list[str] = [name for name in features if name.lower() not in _NO_LABELS and _is_label(features[name])]
        if len(others) == 1 and str(features[others[0]].dtype).endswith("string"):
            notes.append(f"the labels are column {others[0]!r}, as no other can be")
            return others[0]
    column = _only(typed or usual, _LABEL_NAMES, features, "label")
    _require_one_class(features, column)
    return column


def _only(found: list[str], usual: tuple[str, ...], features: datasets.Features, what: str) -> str:
    if not found:
        raise DataError(
            f"Expected a column of {what}s, found {_columns(features)}: pass {what}_column=... to name it"
            + (", or use a data set that has labels." if what == "label" else ".")
        )
    if len(found) == 1:
        return found[0]
    known = [name for name in found if name.lower() in usual]
    plain = [name for name in known if name.lower() == usual[0]]
    if usual[0] in plain or len(plain) == 1:  # plain "image" and "label" are what a loader would take
        return usual[0] if usual[0] in plain else plain[0]
    if len(known) == 1:
        return known[0]
    raise DataError(_ambiguous(found, features, what))


def _among(features: datasets.Features, usual: tuple[str, ...]) -> list[str]:
    return sorted((name for name in features if name.lower() in usual), key=lambda name: usual.index(name.lower()))


def _ambiguous(found: list[str], features: datasets.Features, what: str) -> str:
    choices = " or ".join(f"{what}_column={name!r}" for name in found)
    return f"Expected one column of {what}s, found several in {_columns(features)}: pass {choices}."


def _require(features: datasets.Features, name: str, argument: str) -> None:
    if name not in features:
        raise DataError(f"Expected the column {argument}={name!r}, found {_columns(features)}.")


def _require_one_class(features: datasets.Features, name: str) -> None:
    feature = features[name]
    if _is_label(feature):
        return
    if isinstance(feature, (list, dict)) or hasattr(feature, "feature"):
        raise DataError(
            f"Expected one class per image in column {name!r}, found {_type(feature)}: multi-label data is not "
            "supported; keep the images that have one label and pass that as a column of integers or text."
        )
    raise DataError(
        f"Expected classes (text, integers or ClassLabel) in column {name!r}, found {_type(feature)}: pass "
        f"label_column=... or dataset.cast_column({name!r}, ...); the columns are {_columns(features)}."
    )


def _is_image(feature: Any) -> bool:
    return isinstance(feature, datasets.Image)


def _may_hold_image(feature: Any) -> bool:
    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    return getattr(feature, "dtype", None) in ("string", "large_string", "binary", "large_binary")


def _is_label(feature: Any) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    dtype = str(getattr(feature, "dtype", ""))
    return isinstance(feature, datasets.Value) and dtype.startswith(
        ("string", "large_string", "int", "uint", "bool", "null")
    )


def _type(feature: Any) -> str:
    if isinstance(feature, (list, dict)):
        return type(feature).__name__
    if isinstance(feature, datasets.Value):
        return str(feature.dtype)
    return type(feature).__name__


def _columns(features: datasets.Features) -> str:
    return "columns " + ", ".join(f"{name!r} ({_type(feature)})" for name, feature in features.items())
