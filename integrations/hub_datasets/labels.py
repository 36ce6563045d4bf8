"""Labels of any kind to class indices 0 .. C-1, by one mapping for training and evaluation.

The mapping goes through the *value* of a label (its name where it has one), never through the stored integer: two
splits may declare the same classes in a different order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from entprop_wrap.errors import DataError, LabelError

__all__ = ["LabelMap", "build_label_map", "label_value", "read_labels"]

LabelValue = str | int | None


@dataclass(frozen=True)
class LabelMap:
    """Which class index a label value has.

    Attributes:
        classes: C class names, in the order of their indices.
        index: Label value (a class name, or an integer where the data has no names) to class index.
        notes: What was decided on the way, in sentences.
    """

    classes: tuple[str, ...]
    index: Mapping[str | int, int]
    notes: tuple[str, ...] = ()

    def indices(self, values: Sequence[LabelValue], where: str) -> list[int]:
        """Class indices of the label values, in their order.

        Args:
            values: Label values as `read_labels` gives them.
            where: What they belong to, for the message, such as ``split 'test'``.

        Raises:
            LabelError: An image without a label, or with one that is not among the classes.
        """
        missing = sum(value is None for value in values)
        if missing:
            raise LabelError(
                f"Expected a label for every image of {where}, found {missing:,} of {len(values):,} without one (empty "
                "or -1): drop them with dataset.filter(...), or name another split."
            )
        unknown = sorted({str(value) for value in values if value not in self.index})
        if unknown:
            raise LabelError(
                f"Expected the {len(self.classes)} classes of the training data in {where}, found "
                f"{_some(unknown)} besides: the splits must share their classes ({_some(self.classes)}), or pass "
                "classes=... with all of them."
            )
        return [self.index[value] for value in values if value is not None]


def label_value(raw: Any, feature: Any) -> LabelValue:
    """One stored label as a class name, an integer, or None where the image is unlabelled.

    For a `datasets.ClassLabel`, -1 is the Hub's custom for "unlabelled".

    Raises:
        LabelError: A ClassLabel index that has no name.
    """
    if raw is None:
        return None
    if isinstance(feature, datasets.ClassLabel):
        if isinstance(raw, str):
            return raw
        if raw >= len(feature.names):
            raise LabelError(
                f"Expected labels 0..{len(feature.names) - 1}, for which the ClassLabel has names, found {raw}: "
                "cast_column with a ClassLabel of all names."
            )
        return str(feature.names[raw]) if raw >= 0 else None
    return raw if isinstance(raw, str) else int(raw)


def read_labels(dataset: datasets.Dataset, column: str) -> list[LabelValue]:
    """All labels of one column, as `label_value` gives them; no image is touched.

    A column of plain integers that are all -1 is unlabelled as a whole.
    """
    feature = dataset.features[column]
    raw = dataset.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    values = [label_value(item, feature) for item in raw]
    return [None] * len(values) if set(values) == {-1} else values


def build_label_map(
    values: Sequence[LabelValue] | None, feature: Any, classes: Sequence[str | int] | None = None
) -> LabelMap:
    """The classes of a data set.

    Names come from the `datasets.ClassLabel` in its order, else from the sorted text labels, else from the sorted
    integers.

    Args:
        values: All labels of the training split; None while streaming, when they cannot be known.
        feature: The type of the label column.
        classes: Label values in the order their indices shall have; or, for a column of integers, names for 0 .. C-1.

    Raises:
        DataError: Fewer than two classes, or (streaming) neither ClassLabel nor ``classes``.
        LabelError: -1 among plain integers, which may mean a class or "unlabelled"; repeated ``classes``.
    """
    notes: list[str] = []
    aliases: dict[str | int, int] = {}
    found = set(values or ()) - {None}
    if classes is not None:
        keys: list[Any] = list(classes)
        if len(set(keys)) != len(keys):
            raise LabelError(f"Expected every class once in classes=..., found {_some(keys)}.")
        if _is_integer(feature) and all(isinstance(key, str) for key in keys):
            aliases = {name: position for position, name in enumerate(classes)}  # the other split may hold names
            keys = list(range(len(keys)))
        names = [str(name) for name in classes]
    elif isinstance(feature, datasets.ClassLabel):
        keys = names = [str(name) for name in feature.names]
        if values is not None and found and found < set(keys):
            notes.append(
                f"{len(set(keys) - found)} of the {len(keys)} declared classes have no training image: "
                f"{_some([key for key in keys if key not in found])}"
            )
    elif values is None:
        raise DataError(
            "Expected a ClassLabel column while streaming, found labels whose classes are unknown until all are read: "
            "pass classes=[...] with every label value, or streaming=False."
        )
    else:
        keys = sorted(found)  # type: ignore[type-var]  # one column: all text or all integers
        names = [str(key) for key in keys]
        if -1 in found and found != {-1, 1}:
            raise LabelError(
                f"Expected classes, found -1 among the integers {_some(names)}, which often means 'unlabelled': drop "
                "those images with dataset.filter(...), or pass classes=[-1, ...] if it is a class."
            )
        if keys and not isinstance(keys[0], str) and keys != list(range(len(keys))):
            notes.append(
                f"the {len(keys)} integer labels {_some(names)} were renumbered 0..{len(keys) - 1} in this order"
            )
    if len(keys) < 2:
        raise DataError(
            f"Expected at least two classes, found {_some(names) or 'none'}: name the right label_column=..., or, "
            "for class folders, pass the folder that holds them directly."
        )
    return LabelMap(tuple(names), {**aliases, **{key: index for index, key in enumerate(keys)}}, tuple(notes))


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and str(feature.dtype).startswith(("int", "uint", "bool"))


def _some(items: Sequence[Any], limit: int = 5) -> str:
    shown = ", ".join(repr(item) for item in items[:limit])
    return shown + (f", ... ({len(items)} in all)" if len(items) > limit else "")
