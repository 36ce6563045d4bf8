"""Training and evaluation images of the splits of an opened data set: one numbering of the classes."""

import datasets

from entprop_wrap.errors import DataError
from entprop_wrap.integrations.hub_datasets.columns import find_image_column, find_label_column
from entprop_wrap.integrations.hub_datasets.image_datasets import LabelledImages, StreamedImages
from entprop_wrap.integrations.hub_datasets.labels import LabelMap, build_label_map, label_value, read_labels
from entprop_wrap.integrations.hub_datasets.load_options import LoadOptions
from entprop_wrap.integrations.hub_datasets.splits import split_names, stratified_sample, stratified_split, take_splits

__all__ = ["stored_images", "streamed_images"]


def stored_images(
    splits: dict[str, datasets.Dataset], options: LoadOptions
) -> tuple[LabelledImages, LabelledImages, LabelMap, list[str]]:
    """Map-style data sets to train and to evaluate on, the classes, and notes on what was decided.

    Raises:
        DataError, LabelError, ConfigurationError: As `load_images` says.
    """
    train_name, eval_names = split_names(list(splits), options.train_split, options.eval_split)
    rows = take_splits(splits, {"train_split": train_name})[0]
    image_column = find_image_column(rows.features, options.image_column)
    notes: list[str] = []
    label_column = find_label_column(rows.features, options.label_column, notes)
    if len(rows) == 0:
        raise DataError(f"Expected images in split {train_name!r}, found none.")
    values = read_labels(rows, label_column)
    label_map = build_label_map(values, rows.features[label_column], options.classes)
    labels = label_map.indices(values, f"split {train_name!r}")
    notes.extend(label_map.notes)
    train_positions = list(range(len(rows)))

    eval_name, eval_rows = _labelled_split(splits, train_name, eval_names, image_column, label_column, options, notes)
    if eval_rows is not None:
        eval_labels = label_map.indices(read_labels(eval_rows, label_column), f"split {eval_name!r}")
        eval_positions = list(range(len(eval_rows)))
    else:
        kept, held_out = (part.tolist() for part in stratified_split(labels, options.eval_fraction, options.seed))
        if not held_out:
            raise DataError(
                f"Expected an evaluation split, or classes of two images or more to hold some out, found one image of "
                f"each class in split {train_name!r}: pass eval_split=..."
            )
        notes.append(
            f"no split to evaluate on: {len(held_out):,} of the {len(labels):,} images of split {train_name!r} are "
            f"held out, {options.eval_fraction:.0%} of every class, seed {options.seed}"
        )
        eval_name, eval_rows, eval_positions = f"{train_name} (held out)", rows, held_out
        eval_labels = [labels[position] for position in held_out]
        train_positions, labels = kept, [labels[position] for position in kept]

    train = LabelledImages(
        rows, image_column, labels, train_positions, options.train_transform, options.on_broken, f"split {train_name!r}"
    )
    evaluate = LabelledImages(
        eval_rows, image_column, eval_labels, eval_positions, options.eval_transform, options.on_broken,
        f"split {eval_name!r}",
    )  # fmt: skip
    train = _limited(train, options.max_train, options.seed, notes)
    evaluate = _limited(evaluate, options.max_eval, options.seed, notes)
    if options.on_broken == "skip":
        evaluate = _readable(evaluate, notes)
    return train, evaluate, label_map, notes


def streamed_images(
    splits: dict[str, datasets.IterableDataset], options: LoadOptions
) -> tuple[StreamedImages, StreamedImages, LabelMap, list[str]]:
    """The same for streams: the training stream shuffled, the evaluation stream in its order.

    Raises:
        DataError, ConfigurationError: As `load_images` says.
    """
    train_name, eval_names = split_names(list(splits), options.train_split, options.eval_split)
    for argument, name in (("train_split", train_name), *(("eval_split", name) for name in eval_names)):
        if name not in splits:
            raise DataError(
                f"Expected one of the splits {list(splits)} while streaming, found {argument}={name!r}: a slice needs "
                "streaming=False."
            )
    stream = _with_features(splits[train_name])
    image_column = find_image_column(stream.features, options.image_column)
    notes: list[str] = []
    label_column = find_label_column(stream.features, options.label_column, notes)
    label_map = build_label_map(None, stream.features[label_column], options.classes)
    notes.extend(label_map.notes)
    for eval_name in eval_names:
        eval_stream = _with_features(splits[eval_name])
        if options.eval_split or _first_is_labelled(eval_stream, image_column, label_column):
            break
        notes.append(f"split {eval_name!r} is not used: it has no labels")
    else:
        raise DataError(
            f"Expected a labelled evaluation split while streaming, found {list(splits)}: pass eval_split=..., or "
            "streaming=False to hold images out of the training split."
        )
    if options.max_train is not None:
        stream = stream.take(options.max_train)
    if options.max_eval is not None:
        eval_stream = eval_stream.take(options.max_eval)
    if options.shuffle_buffer:
        stream = stream.shuffle(seed=options.seed, buffer_size=options.shuffle_buffer)
    columns = (image_column, label_column, label_map)
    train = StreamedImages(stream, *columns, options.train_transform, options.on_broken, f"split {train_name!r}")
    evaluate = StreamedImages(eval_stream, *columns, options.eval_transform, options.on_broken, f"split {eval_name!r}")
    return train, evaluate, label_map, notes


def _labelled_split(
    splits: dict[str, datasets.Dataset],
    train_name: str,
    eval_names: tuple[str, ...],
    image_column: str,
    label_column: str,
    options: LoadOptions,
    notes: list[str],
) -> tuple[str, datasets.Dataset | None]:
    """The first split that can be evaluated on, or None."""
    for name in eval_names:
        rows = take_splits(splits, {"train_split": train_name, "eval_split": name})[1]
        problem = _problem(rows, image_column, label_column)
        if problem is None:
            others = eval_names[eval_names.index(name) + 1 :]
            if others:
                rest = ", ".join(map(repr, others))
                notes.append(f"evaluating on split {name!r}; {rest} not touched (eval_split=... names another)")
            return name, rows
        if options.eval_split is not None:
            raise DataError(
                f"Expected labelled images in eval_split={name!r}, found a split that {problem}: name another of "
                f"{list(splits)}, or leave eval_split out to hold images out of {train_name!r}."
            )
        notes.append(f"split {name!r} is not used: it {problem}")
    return "", None


def _problem(rows: datasets.Dataset, image_column: str, label_column: str) -> str | None:
    missing = [name for name in (image_column, label_column) if name not in rows.features]
    if missing:
        return f"has no column {missing[0]!r}"
    if len(rows) == 0:
        return "is empty"
    if all(value is None for value in read_labels(rows, label_column)):
        return "has no labels (all are -1 or empty)"
    return None


def _limited(images: LabelledImages, limit: int | None, seed: int, notes: list[str]) -> LabelledImages:
    if limit is None or limit >= len(images):
        return images
    notes.append(f"{limit:,} of the {len(images):,} images of {images.name} are used, every class in proportion")
    return images.select(stratified_sample(images.labels.tolist(), limit, seed).tolist())


def _readable(images: LabelledImages, notes: list[str]) -> LabelledImages:
    readable = images.without_broken()
    lost = sorted(set(images.positions.tolist()) - set(readable.positions.tolist()))
    if lost:
        notes.append(
            f"{len(lost):,} of the {len(images):,} images of {images.name} cannot be read and are left out: rows "
            f"{', '.join(map(str, lost[:10]))}{', ...' if len(lost) > 10 else ''}"
        )
    return readable


def _with_features(stream: datasets.IterableDataset) -> datasets.IterableDataset:
    """Streams of some formats do not know their columns; the first row tells."""
    if stream.features is not None:
        return stream
    first = next(iter(stream), None)
    if first is None:
        raise DataError("Expected images in the stream, found none.")
    return stream.cast(datasets.Dataset.from_list([first]).features)


def _first_is_labelled(stream: datasets.IterableDataset, image_column: str, label_column: str) -> bool:
    if not {image_column, label_column} <= set(stream.features):
        return False
    first = next(iter(stream.select_columns([label_column])), None)
    return first is not None and label_value(first[label_column], stream.features[label_column]) is not None
