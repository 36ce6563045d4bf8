"""Batches depend on seed, epoch and data; data of another form is refused with what to write instead."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, WeightedRandomSampler

from entprop_wrap import TrainerConfig
from entprop_wrap.errors import DataError
from entprop_wrap.trainer.data_loader import Batches
from tests.helpers.trainer_toys import Images


def batches(data, *, training=True, batch_size=8, workers=0, process=0, processes=1):
    config = TrainerConfig(batch_size=batch_size, workers=workers, seed=3)
    place = SimpleNamespace(process_index=process, num_processes=processes, device=torch.device("cpu"))
    return Batches(data, config, place, training=training)


def content(found):
    return [(images.clone(), labels.clone()) for images, labels in found]


def same(first, second):
    flat = [[tensor for batch in batches for tensor in batch] for batches in (first, second)]
    return len(first) == len(second) and all(map(torch.equal, *flat))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_repeats_from_its_middle(workers):
    data = Images(36, augment=True)
    first = content(batches(data).epoch(2))
    torch.rand(5)
    again = batches(data, workers=workers)
    assert same(content(again.epoch(2, start=2)), first[2:])
    assert not same(content(again.epoch(3)), first)
    assert len(again) == len(first) == 4  # the incomplete batch is left out


def test_loading_leaves_random_states_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    content(batches(Images(augment=True)).epoch(0))
    assert torch.equal(torch.rand(3), expected)


def test_augmentation_differs_between_samples_and_epochs():
    class Random(Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            return torch.rand(3, 2, 2), index

    made = batches(Random())
    drawn = torch.cat([images for epoch in (0, 1) for images, _ in made.epoch(epoch)])
    assert len(drawn.flatten(1).unique(dim=0)) == 32


def test_worker_seeds_differ_between_epochs_and_processes():
    """What a worker_init_fn seeds from them, as PyTorch's documentation has it, would repeat otherwise."""

    class Own(Images):
        def __getitem__(self, index):
            return torch.rand(3, 8, 8, generator=self.own), 0

    def seed_own(worker):
        data.own = torch.Generator().manual_seed(torch.utils.data.get_worker_info().seed)

    data = Own(8)
    data.own = torch.Generator()
    loader = DataLoader(data, 4, num_workers=1, worker_init_fn=seed_own)
    made = [batches(loader, process=rank, processes=2) for rank in (0, 1)]
    drawn = [next(one.epoch(epoch))[0] for one in made for epoch in (0, 1)]
    assert len(torch.cat(drawn).unique(dim=0)) == 16


def test_a_sample_that_a_sampler_repeats_is_augmented_anew():
    def of(**options):
        loader = DataLoader(Images(8, augment=True), 4, sampler=WeightedRandomSampler([1.0, *[0.0] * 7], 8))
        return torch.cat([images for images, _ in batches(loader, **options).epoch(1)])

    assert len(of().unique(dim=0)) == 8
    assert torch.equal(of(), of())
    shares = [of(process=rank, processes=2) for rank in (0, 1)]
    assert torch.equal(torch.cat(shares), of())


def test_processes_share_the_same_epoch():
    data = Images(44)
    whole = content(batches(data).epoch(1))
    shares = [content(batches(data, process=rank, processes=2).epoch(1)) for rank in (0, 1)]
    assert same(shares[0], whole[0:4:2])
    assert same(shares[1], whole[1:4:2])


def test_evaluation_keeps_everything_in_order():
    data = Images(19)
    shares = [batches(data, training=False, process=rank, processes=2) for rank in (0, 1)]
    assert [len(share) for share in shares] == [2, 2]
    assert [share.number for share in shares] == [2, 1]
    labels = [labels for share in shares for _, labels in list(share.epoch(0))[: share.number]]
    assert sorted(map(len, labels)) == [3, 8, 8]
    assert torch.equal(torch.cat([labels[0], labels[2], labels[1]]), data.labels)


@pytest.mark.parametrize("seeded", [False, True])
def test_a_loader_brings_its_sampler_and_collate(seeded):
    data = Images(20)
    weights = torch.ones(20)
    weights[::4] = 0  # no class 0

    def loader():
        generator = torch.Generator().manual_seed(torch.randint(100, ()).item()) if seeded else None
        sampler = WeightedRandomSampler(weights, 12, generator=generator)
        return DataLoader(data, 4, sampler=sampler, collate_fn=lambda samples: {"image": 1, **_dict(samples)})

    first = content(batches(loader()).epoch(1))
    assert len(first) == 3
    assert all((labels > 0).all() for _, labels in first)
    used = loader()
    list(used)  # where its generator stands does not matter
    assert same(content(batches(used).epoch(1, start=1)), first[1:])


def _dict(samples):
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


class Normalising(DataLoader):
    def __iter__(self):
        return ((images - 0.5, labels) for images, labels in super().__iter__())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: Images(0), "train_data is empty"),
        (lambda: DataLoader([], 4), "train_data is empty"),
        (lambda: Images(7), "Choose a smaller batch_size"),
        (lambda: DataLoader(Images(9), 4), "drop_last=True"),
        (lambda: DataLoader(Images(9), None), "batch_size=64"),
        (lambda: Stream(), "a map-style dataset"),
        (lambda: DataLoader(Stream(), 4), "a map-style dataset"),
        (lambda: iter(Images(9)), "a map-style dataset"),
        (lambda: {"train": Images(9), "test": Images(9)}, r"data\['train'\]"),
        (lambda: [image for image, _ in Images(16)], "Tensor without labels"),
        (lambda: [(*sample, 0) for sample in Images(16)], "of 3 items"),
        (lambda: [{"text": "a", "labels": 1}] * 16, "a dict with 'text', 'labels'"),
        (lambda: [(torch.rand(3, 8 + index, 8), 0) for index in range(16)], "tensors of one size"),
        (lambda: [(torch.rand(3, 8, 8), 10**400)] * 16, "do not make a batch"),
        (lambda: [(object(), 1)] * 16, "give the dataset a transform"),
        (lambda: DataLoader(Images(9), 4, sampler=DistributedSampler(Images(9), 2, 0)), "DistributedSampler"),
        (lambda: Normalising(Images(16), 4), "Normalising has an __iter__ of its own"),
    ],
)
def test_other_data_is_refused(data, message):
    with pytest.raises(DataError, match=message):
        batches(data())


def test_epochs_of_changing_length_are_refused():
    class Growing:
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([[0, 1]] * (2 + self.epoch))

    made = batches(DataLoader(Images(9), batch_sampler=Growing()))
    assert len(content(made.epoch(0))) == 2
    with pytest.raises(DataError, match="3 batches in epoch 1, and 2 in the first"):
        content(made.epoch(1))


class Broken(Images):
    def __init__(self, number, error, index=5):
        super().__init__(number)
        self.error, self.index = error, index

    def __getitem__(self, index):
        if index == self.index:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [StopIteration(), KeyError("label"), OSError("truncated")], ids=repr)
def test_a_sample_that_fails_is_named(error, workers):
    data = Broken(32, error, index=None)
    made = batches(data, workers=workers)
    data.index, before = 5, multiprocessing.active_children()
    with pytest.raises(DataError, match=rf"train_data\[5\] raised {type(error).__name__}"):
        content(made.epoch(0))
    assert set(multiprocessing.active_children()) <= set(before)  # they ended at once
    with pytest.raises(DataError, match=r"train_data\[5\]"):
        batches(Broken(8, error))


@pytest.mark.parametrize("start", [0, 2])
def test_an_epoch_that_ends_early_is_no_epoch(start):
    def collate(samples):
        if ended:
            raise StopIteration
        return torch.stack([image for image, _ in samples]), torch.zeros(len(samples)).long()

    ended = False
    made = batches(DataLoader(Images(32), 8, collate_fn=collate))
    epoch = made.epoch(0, start)
    next(epoch)
    ended = True
    with pytest.raises(DataError, match=rf"ended after {start + 1} of 4 batches"):
        list(epoch)


@pytest.mark.parametrize(
    "loader",
    [
        lambda data: DataLoader(data, 4, drop_last=True),
        lambda data: DataLoader(data, 20, drop_last=True),
        lambda data: DataLoader(data, 4, sampler=WeightedRandomSampler(torch.rand(10), 10)),
        lambda data: DataLoader(data, batch_sampler=[[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_evaluating_a_part_is_refused(loader):
    with pytest.raises(DataError, match=r"leaves out some of the 10 samples.*Subset"):
        batches(loader(Images(10)), training=False)
    batches(DataLoader(Images(10), 4, shuffle=True), training=False)


def test_fingerprints_tell_data_apart():
    found = batches(Images(16)).identity["data"]
    assert found == batches(Images(16)).identity["data"]
    assert found["labels"] == batches(Images(16, seed=1)).identity["data"]["labels"]
    assert found["pixels"] != batches(Images(16, seed=1)).identity["data"]["pixels"]

    class OwnState(Images):
        generator = torch.Generator()

        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + 0.01 * torch.rand(1, generator=self.generator), label

    assert batches(OwnState(16)).identity["data"] == {**found, "pixels": "random"}
