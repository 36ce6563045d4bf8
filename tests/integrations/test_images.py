"""Every kind of file becomes an upright 8-bit RGB image or says why not; and datasets of such images with labels."""

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
    to_rgb,
    train_transform,
)
from entprop_wrap.integrations.hub_datasets.images import read_image
from tests.helpers.image_samples import encoded, picture, shade, shades, table, truncated


def rgb_of(data: bytes) -> np.ndarray:
    image = to_rgb(read_image({"bytes": data, "path": None}))
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LA", "RGBA", "PA", "RGBX"])
def test_every_eight_bit_mode_keeps_its_colour(mode):
    grey = Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode)
    result = to_rgb(grey)
    assert result.mode == "RGB"
    assert result.size == (4, 3)
    assert np.abs(np.asarray(result).astype(int) - 255).max() <= 2


def test_cmyk_jpeg_is_not_inverted():
    red = Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK")
    assert np.abs(rgb_of(encoded(red, "JPEG", quality=95))[8, 8].astype(int) - (250, 10, 10)).max() < 12


def test_transparency_shows_the_background_not_what_lies_under_it():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert rgb_of(encoded(image)).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    image = Image.new("P", (2, 1), 0)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert rgb_of(encoded(image, transparency=0)).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_sixteen_bit_gray_is_scaled_not_clipped():
    values = np.array([[0, 257 * 100, 65_535]], dtype=np.uint16)
    assert rgb_of(encoded(Image.fromarray(values)))[0, :, 0].tolist() == [0, 100, 255]
    as_older_pil_opens_it = Image.fromarray(values.astype(np.int32))
    assert np.asarray(to_rgb(as_older_pil_opens_it))[0, :, 2].tolist() == [0, 100, 255]


@pytest.mark.parametrize(
    "image",
    [Image.new("F", (2, 2), 0.5), Image.new("I", (2, 2), 70_000), Image.new("I", (2, 2), -1), Image.new("LAB", (2, 2))],
)
def test_values_without_a_range_are_refused_and_not_taken_for_damage(image):
    with pytest.raises(ImageError, match=r"Expected .*found") as caught:
        to_rgb(image)
    assert not isinstance(caught.value, BrokenImageError)


def test_exif_orientation_is_applied_once():
    image = Image.new("RGB", (20, 10))
    image.paste((255, 255, 255), (0, 0, 10, 10))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    result = rgb_of(encoded(image, "JPEG", exif=exif, quality=95))
    assert result.shape == (20, 10, 3)
    assert result[2].mean() > 240
    assert result[-2].mean() < 15


def test_damaged_exif_leaves_the_pixels(monkeypatch):
    def fail(image):
        raise SyntaxError("not a TIFF header")

    monkeypatch.setattr("entprop_wrap.integrations.hub_datasets.images.ImageOps.exif_transpose", fail)
    assert to_rgb(picture(7)).getpixel((0, 0)) == (7, 0, 100)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert rgb_of(data)[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"bytes": None, "path": None},
        {"bytes": b"", "path": None},
        {"bytes": b"<html>404</html>", "path": "a.jpg"},
        {"bytes": None, "path": "no/such/file.png"},
        {"bytes": truncated(), "path": None},
        {"bytes": truncated("PNG"), "path": None},
    ],
)
def test_unreadable_images_are_broken(value):
    with pytest.raises(BrokenImageError, match="Expected a readable image, found"):
        read_image(value)


def test_reads_paths_and_bytes(tmp_path):
    picture(5).save(tmp_path / "a.png")
    cells = [{"bytes": None, "path": str(tmp_path / "a.png")}, {"bytes": encoded(picture(5)), "path": "gone.png"}]
    assert [read_image(cell).getpixel((0, 0)) for cell in cells] == [(5, 0, 100)] * 2


def test_running_out_of_memory_is_not_a_broken_image(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        read_image({"bytes": b"anything", "path": None})


# --- datasets


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
