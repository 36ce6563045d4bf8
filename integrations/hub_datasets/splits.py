"""Which split trains, which evaluates, and how one is cut in two: seeded, stratified, in the original order."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from entprop_wrap.errors import ConfigurationError, DataError

__all__ = ["EVAL_NAMES", "TRAIN_NAMES", "split_names", "stratified_sample", "stratified_split", "take_splits"]

TRAIN_NAMES = ("train", "training")
# Validation before test: choosing among checkpoints on the test split would use it up.
EVAL_NAMES = ("validation", "val", "valid", "dev", "eval", "test", "testing")


def split_names(
    available: Sequence[str], train: str | None = None, evaluate: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """Return the split to train on, and those to evaluate on, best first; what the user names may be a slice."""
    by_lower = {name.lower(): name for name in available}
    if train is None:
        rest = [name for name in available if name != evaluate]
        usual = [by_lower[name] for name in TRAIN_NAMES if by_lower.get(name) in rest]
        if not usual and len(rest) != 1:
            raise DataError(
                f"Expected a split called 'train', found {list(available)}: pass train_split=... with one of them."
            )
        train = (usual or rest)[0]
    if evaluate is not None:
        return train, (evaluate,)
    used = {part.split("[")[0].strip() for part in train.split("+")}
    return train, tuple(by_lower[name] for name in EVAL_NAMES if name in by_lower and by_lower[name] not in used)


def take_splits(splits: dict[str, Any], **names: str) -> list[Any]:
    """Return one or two splits or slices, such as ``"train[:80%]"`` or ``"train+validation"``, that share no image."""
    parts = [_pieces(splits, name, argument) for argument, name in names.items()]
    if len(parts) > 1 and any(
        name == other and max(rows.start, others.start) < min(rows.stop, others.stop)
        for name, rows in parts[0]
        for other, others in parts[1]
    ):
        raise ConfigurationError(
            f"Expected disjoint splits, found {list(names.values())}, which share images: write for example "
            "'train[:80%]' and 'train[80%:]'."
        )
    return [_join(splits, pieces) for pieces in parts]


def stratified_split(labels: Any, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a labelled dataset in two, the same fraction of every class.

    A class with two images or more gives at least one to each side; a single image stays in the first. This is why
    `datasets.Dataset.train_test_split` does not serve: it raises on such a class, and on fewer images than classes.
    """
    rank, size = _ranks(labels, seed)
    second = rank < np.minimum(size - 1, np.maximum(1, np.round(size * fraction)))
    return np.flatnonzero(~second), np.flatnonzero(second)


def stratified_sample(labels: Any, count: int, seed: int) -> np.ndarray:
    """Return ``count`` positions in order, each class in proportion, and one of each class where ``count`` allows.

    A larger count with the same seed contains the smaller one.
    """
    rank, size = _ranks(labels, seed)
    ties = np.random.default_rng(seed).permutation(len(rank))
    return np.sort(np.lexsort((ties, rank / size))[:count])  # 0 for the first of each class, then evenly up to 1


def _ranks(labels: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the place of each image in its shuffled class, and the size of that class."""
    generator = np.random.default_rng(seed)
    array = np.asarray(labels)
    rank, size = np.zeros((2, len(array)), dtype=np.int64)
    for label in np.unique(array):
        members = generator.permutation(np.flatnonzero(array == label))
        rank[members], size[members] = np.arange(len(members)), len(members)
    return rank, size


def _pieces(splits: dict[str, Any], name: str, argument: str) -> list[tuple[str, range]]:
    """Return the splits that a name or slice is of, and which rows of each; of a stream, any."""
    streams = any(isinstance(rows, datasets.IterableDataset) for rows in splits.values())
    if name in splits:
        return [(name, range(1 if streams else len(splits[name])))]
    if streams:
        raise DataError(
            f"Expected one of the splits {list(splits)} while streaming, found {argument}={name!r}: a slice needs "
            "streaming=False."
        )
    try:
        lengths = {key: len(rows) for key, rows in splits.items()}
        read = datasets.ReadInstruction.from_spec(name).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"Expected one of the splits {list(splits)}, or a slice such as '{next(iter(splits))}[:80%]', found "
            f"{argument}={name!r}."
        ) from error
    return [(item.splitname, range(item.from_ or 0, item.to)) for item in read]


def _join(splits: dict[str, Any], pieces: list[tuple[str, range]]) -> Any:
    rows = splits[pieces[0][0]]
    if isinstance(rows, datasets.IterableDataset):
        return _with_features(rows)
    chosen = [splits[name].select(part) for name, part in pieces]  # of all rows, a view
    return datasets.concatenate_datasets(chosen) if len(chosen) > 1 else chosen[0]


def _with_features(stream: datasets.IterableDataset) -> datasets.IterableDataset:
    """Return a stream that knows its columns: those of some formats do not, and the first row tells."""
    if stream.features is not None:
        return stream
    first = next(iter(stream), None)
    if first is None:
        raise DataError("Expected images in the stream, found none.")
    return stream.cast(datasets.Dataset.from_list([first]).features)
