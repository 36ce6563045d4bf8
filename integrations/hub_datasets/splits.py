"""Which split trains, which evaluates, and how one is cut in two: seeded, stratified, in the original order."""

from collections.abc import Iterable, Sequence

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
    """The split to train on, and those to evaluate on, best first; none means: cut one from the training split.

    Args:
        available: The names of the splits.
        train: The split the user names, perhaps with a slice (``"train[:80%]"``).
        evaluate: The same for evaluation.

    Raises:
        DataError: Several splits, none of which is called train.
        ConfigurationError: Both are the same split.
    """
    if train is not None and train == evaluate:
        raise ConfigurationError(
            f"Expected two different splits, found train_split=eval_split={train!r}: a model is not evaluated on the "
            "images it is trained on; leave eval_split out to cut an evaluation set from it."
        )
    by_lower = {name.lower(): name for name in available}
    if train is None:
        rest = [name for name in available if name != evaluate]
        usual = [by_lower[name] for name in TRAIN_NAMES if name in by_lower and by_lower[name] in rest]
        if not usual and len(rest) != 1:
            raise DataError(
                f"Expected a split called 'train', found {list(available)}: pass train_split=... with one of them."
            )
        train = (usual or rest)[0]
    if evaluate is not None:
        return train, (evaluate,)
    used = {part.split("[")[0].strip() for part in train.split("+")}
    return train, tuple(by_lower[name] for name in EVAL_NAMES if name in by_lower and by_lower[name] not in used)


def take_splits(splits: dict[str, datasets.Dataset], names: dict[str, str]) -> list[datasets.Dataset]:
    """Splits by name or by a slice of it, such as ``"train[:80%]"`` or ``"train+validation"``.

    Args:
        splits: The splits of the data set.
        names: One or two names or slices, which must not share an image, by the argument they came from.

    Raises:
        DataError: No such split.
        ConfigurationError: Two slices overlap.
    """
    parts: list[list[tuple[str, int, int]]] = []
    for argument, name in names.items():
        if name in splits:
            parts.append([(name, 0, len(splits[name]))])
            continue
        try:
            lengths = {key: len(value) for key, value in splits.items()}
            read = datasets.ReadInstruction.from_spec(name).to_absolute(lengths)
        except (ValueError, AssertionError) as error:
            raise DataError(
                f"Expected one of the splits {list(splits)}, or a slice such as '{next(iter(splits))}[:80%]', found "
                f"{argument}={name!r}."
            ) from error
        parts.append([(item.splitname, item.from_ or 0, item.to) for item in read])
    if len(parts) > 1 and _overlap(*parts):
        raise ConfigurationError(
            f"Expected disjoint splits, found {list(names.values())}, which share images: write for example "
            "'train[:80%]' and 'train[80%:]'."
        )
    return [_concatenate(splits, pieces) for pieces in parts]


def stratified_split(labels: Sequence[int], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a labelled data set in two, the same fraction of every class.

    A class with two images or more gives at least one to each side; a single image stays in the first.

    Args:
        labels: Class index of each image, ``(N,)``.
        fraction: Share of the second part, in (0, 1).
        seed: Of the choice; the same seed gives the same parts on every machine.

    Returns:
        Two ascending arrays of positions, which together are ``0 .. N-1``.
    """
    second: list[np.ndarray] = []
    for members in _shuffled_classes(labels, seed):
        count = min(len(members) - 1, max(1, round(len(members) * fraction)))
        second.append(members[:count])
    chosen = np.sort(np.concatenate(second)) if second else np.empty(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def stratified_sample(labels: Sequence[int], count: int, seed: int) -> np.ndarray:
    """``count`` positions, each class in proportion, and at least one of each class where ``count`` allows.

    Args:
        labels: Class index of each image, ``(N,)``.
        count: How many to take; all where there are fewer.
        seed: Of the choice. A larger count with the same seed contains the smaller one.

    Returns:
        Ascending positions, ``(min(count, N),)``.
    """
    generator = np.random.default_rng(seed)
    positions, rank = [], []
    for members in _shuffled_classes(labels, seed):
        positions.append(members)
        rank.append(np.arange(len(members)) / len(members))  # 0 for the first of each class, then evenly up to 1
    flat = np.concatenate(positions) if positions else np.empty(0, dtype=np.int64)
    order = np.lexsort((generator.permutation(len(flat)), np.concatenate(rank))) if positions else flat
    return np.sort(flat[order[:count]])


def _shuffled_classes(labels: Sequence[int], seed: int) -> Iterable[np.ndarray]:
    generator = np.random.default_rng(seed)
    array = np.asarray(labels, dtype=np.int64)
    for label in np.unique(array):
        yield generator.permutation(np.flatnonzero(array == label))


def _overlap(first: list[tuple[str, int, int]], second: list[tuple[str, int, int]]) -> bool:
    return any(
        name == other and max(start, other_start) < min(stop, other_stop)
        for name, start, stop in first
        for other, other_start, other_stop in second
    )


def _concatenate(splits: dict[str, datasets.Dataset], parts: list[tuple[str, int, int]]) -> datasets.Dataset:
    pieces = [
        splits[name] if (start, stop) == (0, len(splits[name])) else splits[name].select(range(start, stop))
        for name, start, stop in parts
    ]
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)
