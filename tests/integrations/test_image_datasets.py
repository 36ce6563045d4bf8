"""Datasets of (image, label): broken images, workers, and images in memory."""

import pickle
from multiprocessing.reduction import ForkingPickler

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from entprop_wrap.errors import ConfigurationError, DataError, ImageError
from entprop_wrap.integrations.hub_datasets import (
    BrokenImageError,
    collate,
    eval_transform,
    in_memory,
    load_images,
    train_transform,
)
from tests.helpers.image_samples import encoded, picture, shade, shades, table

NAMES = ["a", "b"]
LABELS = [0, 1] * 5


def splits(train_broken=(), eval_broken=()) -> datasets.DatasetDict:
    return datasets.DatasetDict(
        train=table(LABELS, NAMES, broken=train_broken), test=table(LABELS, NAMES, broken=eval_broken)
    )


def test_training_puts_the_next_good_image_with_its_label_and_counts(caplog):
    train = load_images(splits(train_broken=(2, 3, 9))).train
    assert shades(train) == [0, 1, 4, 4, 4, 5, 6, 7, 8, 0]
    assert [label for _, label in train] == [0, 1, 0, 0, 0, 1, 0, 1, 0, 0]
    assert train.broken == (2, 3, 9)
    assert sum("skipped: Image 2 of split 'train'" in line for line in caplog.messages) == 1


def test_workers_report_broken_images_to_the_main_process():
    data = load_images(splits(train_broken=(2, 9)), train_transform=eval_transform(8))
    loader = DataLoader(data.train, batch_size=5, num_workers=1, collate_fn=collate)
    labels = torch.cat([label for _, label in loader])
    assert labels.tolist() == [0, 1, 1, 1, 0, 1, 0, 1, 0, 0]
    assert data.train.broken == (2, 9)


def test_spawned_workers_would_report_too():
    train = load_images(splits(train_broken=(2,))).train
    sent = pickle.loads(ForkingPickler.dumps(train))  # how a spawned worker gets its data set
    assert shade(sent[2][0]) == 3
    assert train.broken == (2,)


def test_evaluation_counts_no_image_twice():
    data = load_images(splits(eval_broken=(0, 5)))
    assert shades(data.eval) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert data.eval.labels.tolist() == [1, 0, 1, 0, 0, 1, 0, 1]
    assert any("2 of the 10 images of split 'test' cannot be read and are left out: rows 0, 5" in n for n in data.notes)


def test_evaluation_never_falls_back_on_a_stand_in(monkeypatch):
    data = load_images(splits())

    def fail(value):
        raise BrokenImageError("gone since the scan")

    monkeypatch.setattr("entprop_wrap.integrations.hub_datasets.image_datasets.read_image", fail)
    with pytest.raises(BrokenImageError, match="Image 3 of split 'test'"):
        data.eval[3]


def test_broken_images_raise_on_request_with_their_index():
    data = load_images(splits(train_broken=(2,), eval_broken=(5,)), on_broken="raise")
    assert shade(data.train[1][0]) == 1
    with pytest.raises(BrokenImageError, match=r"Image 2 of split 'train' \(row 2\): Expected a readable image"):
        data.train[2]
    with pytest.raises(BrokenImageError, match="Image 5 of split 'test'"):
        data.eval[5]
    with pytest.raises(BrokenImageError, match="Image 2"):
        in_memory(data.train, 8)


def test_nothing_readable_is_an_error():
    every = tuple(range(10))
    with pytest.raises(DataError, match="found none among 10"):
        load_images(splits(train_broken=every)).train[0]
    with pytest.raises(DataError, match="found none among 10"):
        load_images(splits(eval_broken=every))


def test_a_format_without_meaning_is_never_skipped():
    rows = splits()
    tiff = encoded(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), "TIFF")
    cells = [
        {"bytes": tiff, "path": None},
        *rows["train"].cast_column("image", datasets.Image(decode=False))["image"][1:],
    ]
    rows["train"] = datasets.Dataset.from_dict({"image": cells, "label": LABELS}).cast_column("image", datasets.Image())
    train = load_images(rows, classes=NAMES).train
    with pytest.raises(ImageError, match=r"Image 0 .*mode 'F'") as caught:
        train[0]
    assert not isinstance(caught.value, BrokenImageError)


def test_an_error_in_the_transform_is_not_a_broken_image():
    def fail(image):
        raise OSError("a bug of the user")

    train = load_images(splits(), train_transform=fail).train
    with pytest.raises(OSError, match="a bug"):
        train[0]
    assert train.broken == ()


def test_indexing_transforms_and_pickling():
    data = load_images(splits(train_broken=(4,)), train_transform=train_transform(8))
    image, label = data.train[-1]
    assert image.shape == (3, 8, 8)
    assert type(label) is int
    with pytest.raises(IndexError):
        data.train[10]
    copied = pickle.loads(pickle.dumps(data))
    assert copied.classes == data.classes
    assert shades(copied.train.with_transform(None)) == shades(data.train.with_transform(None))
    plain = data.with_transforms(None, eval_transform(4))
    assert plain.train[0][0].mode == "RGB"
    assert plain.eval[0][0].shape == (3, 4, 4)
    assert data.train[0][0].shape == (3, 8, 8)


def test_in_memory_holds_every_readable_image_once():
    data = load_images(splits(train_broken=(2, 9)))
    held = in_memory(data.train, 8)
    assert held.images.dtype == torch.uint8
    assert held.images.shape == (8, 3, 8, 8)
    assert held.images[:, 0, 4, 4].tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert held.labels.tolist() == [0, 1, 1, 0, 1, 0, 1, 0]
    assert data.train.broken == (2, 9)
    image, label = in_memory(data.train, 8, train_transform(6))[2]
    assert image.shape == (3, 6, 6)
    assert (image[0] * 255).round().unique().tolist() == [3]
    assert label == 1


def test_in_memory_crops_the_centre():
    wide = picture(1, size=(30, 10))
    wide.paste((200, 0, 0), (10, 0, 20, 10))
    rows = datasets.Dataset.from_dict({"image": [wide] * 4, "label": [0, 0, 1, 1]})
    held = in_memory(load_images(rows).train, 10)
    assert (held.images[0] == torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None]).all()


def test_in_memory_takes_a_size_in_pixels():
    with pytest.raises(ConfigurationError, match="size must be an integer"):
        in_memory(load_images(splits()).train, 0)
