"""Transforms, and batches for Hugging Face models."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from entprop_wrap import PixelSpace
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.integrations.hub_datasets import eval_transform, hf_collate, train_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width: int = 90, height: int = 60) -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("make", [train_transform, eval_transform])
@pytest.mark.parametrize("size", [32, (24, 40)])
@pytest.mark.parametrize("source", [noise(), noise(20, 13), v2.functional.pil_to_tensor(noise())])
def test_output_is_a_plain_float_tensor_in_the_unit_range(make, size, source):
    result = make(size)(source)
    assert type(result) is torch.Tensor
    assert result.dtype == torch.float32
    assert tuple(result.shape[1:]) == (size if isinstance(size, tuple) else (size, size))
    assert 0 <= result.min() < result.max() <= 1


def test_eval_resizes_the_short_side_and_crops_the_centre():
    image = Image.new("RGB", (80, 40))
    image.paste((255, 255, 255), (20, 0, 60, 40))  # the middle half is white
    assert eval_transform(32, resize=32)(image)[:, :, 2:-2].min() == 1
    assert eval_transform(32, resize=(32, 32))(image)[:, :, :6].max() == 0  # the whole width, squeezed
    image.putpixel((40, 20), (0, 0, 0))
    centre = v2.functional.pil_to_tensor(image.crop((20, 0, 60, 40))) / 255
    assert torch.equal(eval_transform(40, resize=40)(image), centre)


@pytest.mark.parametrize("make", [train_transform, eval_transform])
def test_normalization(make):
    torch.manual_seed(0)
    plain = make(16)(noise())
    torch.manual_seed(0)
    normal = make(16, normalize=PixelSpace(MEAN, STD))(noise())
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(normal, (plain - mean) / std)


def test_one_number_normalizes_every_channel():
    result = eval_transform(16, normalize=PixelSpace((0.5,), (0.5,)))(noise())
    torch.testing.assert_close(result, eval_transform(16)(noise()) * 2 - 1)


def test_train_transform_is_random_reproducible_and_respects_its_scale():
    transform = train_transform(16)
    torch.manual_seed(3)
    first, second = transform(noise()), transform(noise())
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(transform(noise()), first)
    square = noise(60, 60)
    whole, mirrored = (train_transform(16, scale=(1, 1), flip=flip)(square) for flip in (0, 1))
    torch.testing.assert_close(whole, eval_transform(16, resize=(16, 16))(square))
    torch.testing.assert_close(mirrored, whole.flip(2), atol=0.02, rtol=0)


@pytest.mark.parametrize("transform", [train_transform(16), eval_transform(16, normalize=PixelSpace(MEAN, STD))])
def test_transforms_can_be_sent_to_workers(transform):
    assert pickle.loads(pickle.dumps(transform))(noise()).shape == (3, 16, 16)


def test_an_area_that_torchvision_would_take_is_refused():
    for scale in ((0.5, 0.2), (0.0, 1.0), (0.5, 1.5)):
        with pytest.raises(ConfigurationError, match="scale must be"):
            train_transform(16, scale=scale)


def test_batches_for_hugging_face_models():
    images = [torch.full((3, 8, 8), index / 10) for index in range(4)]
    batch = hf_collate([(image, index) for index, image in enumerate(images)])
    assert set(batch) == {"pixel_values", "labels"}
    assert torch.equal(batch["pixel_values"], torch.stack(images))
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [0, 1, 2, 3]
    assert hf_collate([(image, torch.tensor([0.25, 0.75])) for image in images])["labels"].shape == (4, 2)
