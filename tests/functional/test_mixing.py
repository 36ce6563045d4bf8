"""Mixing is the linear map it says, follows its generator, and keeps the memory format."""

import pytest
import torch

from entprop_wrap import MixUp
from entprop_wrap.functional import CutMix
from entprop_wrap.utils.tensors import index_rows


def images(count=6, height=10, width=14):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_cutmix_pastes_a_box_and_counts_its_area():
    batch = images()
    for seed in range(20):
        mix = CutMix().draw(batch.shape, torch.Generator().manual_seed(seed))
        mixed = mix.apply(batch)
        for i, j in enumerate(mix.partner.tolist()):
            changed = (mixed[i] != batch[i]).any(0)
            assert torch.equal(mixed[i][:, changed], batch[j][:, changed])
            if j != i:
                assert float(changed.double().mean()) == pytest.approx(1 - mix.share, abs=1e-12)
                rows, columns = changed.any(1), changed.any(0)
                assert torch.equal(changed, rows[:, None] & columns[None, :])


@pytest.mark.parametrize("mixer", [MixUp(0.2), CutMix(1.0)])
def test_shares_have_the_mean_of_their_distribution(mixer):
    generator = torch.Generator().manual_seed(0)
    shares = [mixer.draw(torch.Size((2, 3, 64, 64)), generator).share for _ in range(3000)]
    assert all(0 <= share <= 1 for share in shares)
    # A clipped box is smaller than drawn, so CutMix keeps more than half on average.
    assert sum(shares) / 3000 == pytest.approx(0.5 if isinstance(mixer, MixUp) else 0.66, abs=0.03)


@pytest.mark.parametrize("mixer", [MixUp(), CutMix()])
def test_draws_follow_the_generator_and_torch_s_seed(mixer):
    batch = images()
    drawn = [mixer.draw(batch.shape, torch.Generator().manual_seed(3)).apply(batch) for _ in range(2)]
    assert torch.equal(*drawn)
    seeded = []
    for _ in range(2):
        torch.manual_seed(5)
        seeded.append(mixer.draw(batch.shape, None).apply(batch))
    assert torch.equal(*seeded)
    assert not torch.equal(seeded[0], drawn[0])


@pytest.mark.parametrize("mixer", [MixUp(), CutMix()])
def test_channels_last_is_kept_and_the_input_untouched(mixer):
    batch = images().contiguous(memory_format=torch.channels_last)
    before = batch.clone()
    mixed = mixer.draw(batch.shape, None).apply(batch)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert index_rows(batch, torch.tensor([2, 0])).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, before)
