"""Which split trains, which evaluates, and how one is cut in two: seeded, stratified, in the original order."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from entprop_wrap.errors import ConfigurationError, DataError

TRAIN_NAMES = ("train", "training")
# Validation before test: choosing among checkpoints on the test split would use it up.
EVAL_NAMES = ("validation", "val", "valid", "dev", "eval", "test", "testing")


def split_names(
    available: Sequence[str], train: str | None = None, evaluate: str | None = None
) -> tuple[str, tuple[str, ...]]:
    """Return the split to train on, and those to evaluate on, best first, unless the user names them."""
    for argument, name in (("train_split", train), ("eval_split", evaluate)):
        if name is not None and name not in available:
            raise DataError(
                f"Expected one of the splits {list(available)}, found {argument}={name!r}: for a part of a split, pass "
                "datasets.DatasetDict(train=load_dataset(..., split='train[:80%]'), test=...)."
            )
    by_lower = {name.lower(): name for name in available}
    if train is None:
        rest = [name for name in available if name != evaluate]
        usual = [by_lower[name] for name in TRAIN_NAMES if by_lower.get(name) in rest]
        if not usual and len(rest) != 1:
            raise DataError(f"Expected a split called 'train', found {list(available)}: pass train_split=...")
        train = (usual or rest)[0]
    if train == evaluate:
        raise ConfigurationError(
            f"Expected two splits, found train_split=eval_split={train!r}: leave eval_split out to hold images out."
        )
    if evaluate is not None:
        return train, (evaluate,)
    return train, tuple(by_lower[name] for name in EVAL_NAMES if by_lower.get(name, train) != train)


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
