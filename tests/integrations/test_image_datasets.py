"""Datasets of (image, label): broken images, transforms, and images in memory."""

import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from entprop_wrap.errors import DataError, ImageError
from entprop_wrap.integrations.hub_datasets import (
    BrokenImageError,
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


def test_broken_images_are_left_out_and_counted(caplog):
    data = load_images(splits(train_broken=(2, 3, 9), eval_broken=(0, 5)))
    assert shades(data.train) == [0, 1, 4, 5, 6, 7, 8]
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert shades(data.eval) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert data.eval.labels.tolist() == [1, 0, 1, 0, 0, 1, 0, 1]
    assert data.notes == (
        "3 of the 10 images of split 'train' cannot be read and are left out: rows 2, 3, 9",
        "2 of the 10 images of split 'test' cannot be read and are left out: rows 0, 5",
    )
    assert "left out: Image 2 of split 'train'" in caplog.text


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
    with pytest.raises(DataError, match="in split 'test', found none among 10"):
        load_images(splits(eval_broken=tuple(range(10))))


def test_a_format_without_meaning_is_never_left_out():
    rows = splits()
    tiff = encoded(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), "TIFF")
    cells = rows["train"].cast_column("image", datasets.Image(decode=False))[:]["image"]
    cells[0] = {"bytes": tiff, "path": None}
    rows["train"] = datasets.Dataset.from_dict({"image": cells, "label": LABELS}).cast_column("image", datasets.Image())
    with pytest.raises(ImageError, match=r"Image 0 .*mode 'F'") as caught:
        load_images(rows, classes=NAMES)
    assert not isinstance(caught.value, BrokenImageError)


def test_indexing_transforms_and_pickling():
    data = load_images(splits(), train_transform=train_transform(8))
    image, label = data.train[-1]
    assert image.shape == (3, 8, 8)
    assert type(label) is int
    with pytest.raises(IndexError):
        data.train[10]
    copied = pickle.loads(pickle.dumps(data))
    assert copied.classes == data.classes
    assert shades(copied.train.with_transform(None)) == list(range(10))
    plain = data.with_transforms(None, eval_transform(4))
    assert plain.train[0][0].mode == "RGB"
    assert plain.eval[0][0].shape == (3, 4, 4)
    assert data.train[0][0].shape == (3, 8, 8)


def test_in_memory_holds_every_image_once():
    held = in_memory(load_images(splits(train_broken=(2, 9))).train, 8, train_transform(6))
    assert held.images.dtype == torch.uint8
    assert held.images.shape == (8, 3, 8, 8)
    assert held.images[:, 0, 4, 4].tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert held.labels.tolist() == [0, 1, 1, 0, 1, 0, 1, 0]
    image, label = held[2]
    assert image.shape == (3, 6, 6)
    assert (image[0] * 255).round().unique().tolist() == [3]
    assert label == 1


def test_in_memory_crops_the_centre():
    wide = picture(1, size=(30, 10))
    wide.paste((200, 0, 0), (10, 0, 20, 10))
    rows = datasets.Dataset.from_dict({"image": [wide] * 4, "label": [0, 0, 1, 1]})
    held = in_memory(load_images(rows).train, 10)
    assert (held.images[0] == torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None]).all()
