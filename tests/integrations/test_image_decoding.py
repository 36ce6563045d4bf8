"""Every kind of file becomes an upright 8-bit RGB image, or says why not."""

import numpy as np
import pytest
from PIL import Image

from entprop_wrap.errors import ImageError
from entprop_wrap.integrations.hub_datasets.images import BrokenImageError, read_image, to_rgb
from tests.helpers.image_samples import encoded, picture, truncated


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
