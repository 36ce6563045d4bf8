"""Training data that grows: what it becomes, when, and that interruptions change nothing."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

import entprop_wrap as entprop
from entprop_wrap.data.batches import form_of
from entprop_wrap.errors import CheckpointError, ConfigurationError, DataError
from entprop_wrap.methods import EntropyAscent, Vanilla
from entprop_wrap.trainer import MaximumEntropyGrowth
from entprop_wrap.trainer.enlarged import Enlarged, from_bytes, to_bytes
from entprop_wrap.trainer.optimizer import _factor
from tests.helpers.launch import python, torchrun
from tests.helpers.trainer_toys import BatchNormNet, GroupNormNet, Images, make
from tests.reference import meada as reference
from tests.trainer.growth_programs import ASCENT, darker, growing
from tests.trainer.test_resume import contents, equal, lines

SPACE = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    growing(folder).fit()
    return folder


# When -----------------------------------------------------------------------------------------------------------------


def plan(growth, *, images, batch, epochs, accumulation=1):
    return growth.plan(lambda phase: images * 2**phase // batch, epochs, accumulation)


def test_the_plan_of_the_published_runs():
    cifar = plan(MaximumEntropyGrowth.cifar(), images=50000, batch=128, epochs=100)
    assert cifar == [(0, 390)] * 10 + [(1, 781)] * 10 + [(2, 1562)] * 80
    mnist = plan(MaximumEntropyGrowth.mnist(), images=10000, batch=32, epochs=5)
    assert mnist == [(0, 100), (1, 100), (2, 100), (3, 2500), (3, 2500)]
    assert MaximumEntropyGrowth.mnist().ascent == EntropyAscent.mnist()
    assert MaximumEntropyGrowth.cifar(every=5).every == 5


def test_phases_by_steps_count_steps_of_several_batches_and_may_take_epochs():
    growth = MaximumEntropyGrowth(phases=2, every=5, unit="steps")
    # 3 steps of an epoch of 6 batches, 2 of the next; then 5 of 10; 24 batches are 12 steps
    assert plan(growth, images=24, batch=4, epochs=4, accumulation=2) == [(0, 6), (0, 4), (1, 10), (2, 24)]
    # an epoch that ends with the phase is whole: 3 + 3 steps
    growth = MaximumEntropyGrowth(phases=1, every=6, unit="steps")
    assert plan(growth, images=20, batch=4, epochs=3, accumulation=2) == [(0, 5), (0, 5), (1, 10)]


@pytest.mark.parametrize(("unit", "every", "epochs"), [("epochs", 5, 10), ("steps", 30, 8), ("epochs", 20, 10)])
def test_a_run_too_short_for_its_phases_is_refused(unit, every, epochs):
    with pytest.raises(ConfigurationError, match=rf"2 phases, one every {every} {unit}, do not fit .* {epochs} epochs"):
        plan(MaximumEntropyGrowth(phases=2, every=every, unit=unit), images=20, batch=4, epochs=epochs)


def test_the_schedule_runs_over_all_steps(tmp_path):
    trainer = growing(tmp_path, log_every=1, warmup=0.1)
    assert trainer._growing.spans == [(0, 3), (1, 3), (2, 20)]
    trainer.fit()
    assert trainer.position.step == trainer._state.total_steps == 26
    rates = [line["learning_rate"] for line in lines(tmp_path) if line["kind"] == "train"]
    assert rates == pytest.approx([1e-2 * _factor("cosine", 3, 26, step) for step in range(26)])
    assert [line["epoch"] for line in lines(tmp_path) if line["kind"] == "eval"] == [1, 2, 3]
    assert {line["epoch"] for line in lines(tmp_path)} >= {1.3333, 2.05}


# What -----------------------------------------------------------------------------------------------------------------


class Samples(Images):
    """Images in a pixel space, in float64, with soft or plain labels, as pairs or dicts."""

    def __init__(self, *, soft=False, mapping=False, **options):
        super().__init__(10, **options)
        self.soft, self.mapping = soft, mapping

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        mean, std = (torch.tensor(SPACE[name], dtype=torch.float64).view(3, 1, 1) for name in ("mean", "std"))
        image = (image.double() - mean) / std
        label = torch.eye(4).double()[label] if self.soft else label
        return {"image": image, "label": label} if self.mapping else (image, label)


@pytest.mark.parametrize(
    ("soft", "mapping", "loader"), [(False, False, False), (True, False, True), (False, True, False)]
)
def test_phases_against_the_reference(tmp_path, soft, mapping, loader):
    """Each image of the data as it then is climbs alone, by the weights of the last checkpoint before."""
    data = Samples(soft=soft, mapping=mapping, augment=True)
    source = Samples(soft=soft)
    trainer = entprop.Trainer(
        make(BatchNormNet).double(),
        DataLoader(data, 4, shuffle=True, drop_last=True) if loader else data,
        pixel_space=entprop.PixelSpace(**SPACE),
        growth=MaximumEntropyGrowth(ASCENT, phases=2, every=1, source=source),
        config=entprop.TrainerConfig(epochs=3, batch_size=4, output_dir=tmp_path, progress=False, keep_last=None),
        method=entprop.EntProp(fraction=0.5),
    )
    trainer.fit()
    images = torch.stack([source[i][0] for i in range(10)])
    labels = torch.stack([torch.as_tensor(source[i][1]) for i in range(10)])
    for phase, step in ((1, 2), (2, 7)):
        model = make(BatchNormNet).double()
        model.load_state_dict(load_file(tmp_path / f"checkpoints/step-{step:08d}/model.safetensors"))
        model.eval()

        def logits_and_features(pixels, model=model):
            features = torch.relu(model.bn(model.conv(pixels))).mean((2, 3))
            return model.fc(features), features

        limits = {"eta": 10.0, "gamma": 1.0, "steps": 2, "step_size": 1.0}
        grown = reference.climb(logits_and_features, images, labels, **limits, **SPACE)
        mean, std = (grown.new_tensor(SPACE[name]).view(3, 1, 1) for name in ("mean", "std"))
        expected = ((grown * std + mean) * 255).round().byte()
        found = load_file(tmp_path / f"checkpoints/growth/phase-0{phase}.safetensors")
        assert torch.equal(found["images"], expected)
        assert torch.equal(found["labels"], labels)
        assert (expected.float() / 255 - (images * std + mean)).abs().max() > 0.02  # it has gone somewhere
        images = torch.cat([images, (expected.double() / 255 - mean) / std])
        labels = torch.cat([labels, labels])
    assert trainer._growing.samples == 40
    found = [(trainer._growing.current.dataset[i]) for i in range(40)]
    assert all(type(sample) is type(data[0]) for sample in found)
    if not mapping:
        torch.testing.assert_close(torch.stack([image for image, _ in found])[10:], images[10:])
        assert torch.equal(torch.stack([torch.as_tensor(label) for _, label in found]), labels)


def test_without_a_source_the_augmented_images_climb(tmp_path):
    def first_phase(name, source):
        growth = MaximumEntropyGrowth(ASCENT, phases=1, every=1, source=source)
        config = entprop.TrainerConfig(epochs=2, batch_size=4, output_dir=tmp_path / name, progress=False)
        model, data = make(GroupNormNet), Images(8, augment=True)
        entprop.Trainer(model, data, method=Vanilla(), growth=growth, config=config).fit()
        return load_file(tmp_path / name / "checkpoints/growth/phase-01.safetensors")["images"]

    augmented, again, plain = first_phase("a", None), first_phase("b", None), first_phase("c", Images(8))
    assert torch.equal(augmented, again)
    assert not torch.equal(augmented, plain)


def test_grown_images_are_augmented_in_training_and_not_while_growing():
    parts = [{"images": torch.full((4, 3, 2, 2), 200, dtype=torch.uint8), "labels": torch.arange(4)}]
    data, space = Images(4), entprop.PixelSpace()
    form = form_of(data[0], "data")
    image, label = Enlarged(data, parts, form, space, darker)[5]
    assert label == 1
    assert isinstance(label, int)
    assert 0.5 * 200 / 255 <= image.max() <= 0.6 * 200 / 255
    image, _ = Enlarged(data, parts, form, space, pairs=True)[5]
    assert torch.equal(image, torch.full((3, 2, 2), 200 / 255))
    assert torch.equal(Enlarged(data, parts, form, space, darker)[3][0], data[3][0])


def test_bytes_and_back():
    space = entprop.PixelSpace(**SPACE)
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    images = from_bytes(every[0], space, torch.float32)[None]
    assert images.dtype == torch.float32
    assert torch.equal(to_bytes(images, space), every)
    lower, upper = space.bounds(images)
    assert torch.equal(
        to_bytes(torch.cat([lower, upper]), space), torch.tensor([0, 255]).byte().view(2, 1, 1, 1).expand(2, 3, 1, 1)
    )


# Interruptions --------------------------------------------------------------------------------------------------------


def assert_same_run(folder, other, steps):
    for step in steps:
        first, second = (contents(path / f"checkpoints/step-{step:08d}") for path in (folder, other))
        assert set(first) == set(second)
        for file in first:
            assert equal(first[file], second[file]), f"step {step} {file}"
    for phase in (1, 2):
        name = f"checkpoints/growth/phase-0{phase}.safetensors"
        assert equal(load_file(folder / name), load_file(other / name))
    assert sorted(path.name for path in (other / "checkpoints/growth").iterdir()) == [
        "phase-01.safetensors",
        "phase-02.safetensors",
    ]
    assert lines(folder) == lines(other)
    model = "model/model.safetensors"
    assert equal(load_file(folder / model), load_file(other / model))


def test_resume_in_a_new_process_is_bitwise(whole, tmp_path):
    stops = {
        "first phase": {"stop_after": 6},  # in step 6: after the first phase, whose checkpoint is of step 4
        "second phase, workers": {"stop_after": 20},
        "growing": {"stop_growing": 14},  # in the second phase, of which nothing is kept
    }
    folders = [tmp_path / name for name in stops]
    for folder, stop in zip(folders, stops.values(), strict=True):
        with pytest.raises(KeyboardInterrupt):
            growing(folder, **stop).fit()
    names = [sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step-*"))[-1] for folder in folders]
    assert names == [4, 16, 6]
    assert not (folders[2] / "checkpoints/growth/phase-02.safetensors").exists()
    python("tests.trainer.growth_programs", "resume", *folders)
    for folder in folders:
        assert_same_run(whole, folder, (8, 16, 26))


def test_resume_into_another_folder_takes_the_grown_images_along(whole, tmp_path):
    growing(tmp_path).fit(resume=whole / "checkpoints/step-00000016")
    for phase in (1, 2):
        name = f"checkpoints/growth/phase-0{phase}.safetensors"
        assert (whole / name).read_bytes() == (tmp_path / name).read_bytes()
    last = "checkpoints/step-00000026"
    assert equal(contents(whole / last), contents(tmp_path / last))


def test_grown_images_that_are_missing_damaged_or_others_are_named(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints/step-00000026")
    path = folder / "checkpoints/growth/phase-01.safetensors"
    content = path.read_bytes()
    for broken in (content[:100], content[:-1] + bytes([content[-1] ^ 1]), None):
        path.unlink()
        if broken is not None:
            path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"phase-01\.safetensors"):
            growing(folder).fit(resume=folder / "checkpoints/step-00000016")
        path.touch()
    with pytest.warns(UserWarning, match=r"phase-01\.safetensors"):
        growing(folder).fit(resume=True)  # from before the phase, which makes them again
    assert_same_run(whole, folder, (8, 16, 26))


def test_another_growth_is_another_run(whole):
    other = growing(whole)
    other._state.identity["growth"] = "something else"
    with pytest.raises(CheckpointError, match="growth"):
        other.fit(resume=True)


def test_two_processes_make_a_share_each_and_resume(tmp_path):
    torchrun(tmp_path / "logs", "tests.trainer.growth_programs", "distributed", tmp_path)
    folder = tmp_path / "whole/checkpoints"
    source = Images(24)
    images = torch.stack([source[i][0] for i in range(24)])
    # by the statistics of the main process, which its checkpoint holds
    model = make(BatchNormNet)
    model.load_state_dict(load_file(folder / "step-00000003/model.safetensors"))
    rest = {"loss": torch.nn.functional.cross_entropy, "space": entprop.PixelSpace()}
    grown = [
        ASCENT.run(model, model, images[start : start + 4], source.labels[start : start + 4], **rest)
        for start in range(0, 24, 4)
    ]
    found = load_file(folder / "growth/phase-01.safetensors")
    assert torch.equal(found["images"], to_bytes(torch.cat(grown), entprop.PixelSpace()))
    assert torch.equal(found["labels"], source.labels)
    assert len(load_file(folder / "growth/phase-02.safetensors")["images"]) == 48


# Refusals -------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


class Named(Images):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {"image": image, "label": label, "name": str(index)}


class Undecoded(Images):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.numpy(), label


def stacked(samples):
    images, labels = zip(*samples, strict=True)
    return torch.stack([torch.as_tensor(image) for image in images]), torch.tensor(labels)


def trainer(tmp_path, data, *, epochs=3, **options):
    config = entprop.TrainerConfig(epochs=epochs, batch_size=4, output_dir=tmp_path, progress=False)
    growth = MaximumEntropyGrowth(ASCENT, phases=1, every=1, **options)
    return entprop.Trainer(make(BatchNormNet), data, method=entprop.EntProp(), growth=growth, config=config)


@pytest.mark.parametrize(
    ("data", "source", "message"),
    [
        (lambda: Stream(), None, "map-style dataset"),
        (lambda: Named(8), None, "a dict with 'image', 'label', 'name'"),
        (lambda: DataLoader(Undecoded(8), 4, collate_fn=stacked), None, r"found \(ndarray, int\)"),
        (lambda: DataLoader(Images(8), 4, sampler=WeightedRandomSampler([1] * 8, 8)), None, "sampler of its own"),
        (lambda: DataLoader(Images(8), batch_sampler=[[0, 1], [2, 3]]), None, "sampler of its own"),
        (lambda: Images(8), Images(9), "source has 9 samples, train_data 8"),
        (lambda: Images(8), Stream(), "source: expected a map-style dataset"),
        (lambda: Images(8), Undecoded(8), r"source: expected .* found \(ndarray, int\)"),
        (lambda: Images(8), [(torch.zeros(3, 8, 8), 3)] * 8, "with label 3, that of train_data .* with 0"),
        (lambda: Images(8), [(torch.zeros(3, 9, 9), 0)] * 8, r"is \(3, 9, 9\) .* \(3, 8, 8\)"),
    ],
)
def test_data_that_cannot_grow_is_refused_before_the_model_changes(tmp_path, data, source, message):
    with pytest.raises(DataError, match=message):
        trainer(tmp_path, data(), source=source)
    model = make(BatchNormNet)
    with pytest.raises(DataError, match="map-style"):
        entprop.Trainer(model, Images(64), growth=MaximumEntropyGrowth(source=Stream(), every=1))
    assert not any("entprop" in name for name in model.state_dict())


def test_a_run_too_short_and_a_growth_that_is_none(tmp_path):
    with pytest.raises(ConfigurationError, match="do not fit into a run of 1 epochs"):
        trainer(tmp_path, Images(8), epochs=1)
    with pytest.raises(TypeError, match=r"growth expects MaximumEntropyGrowth\.cifar\(\)"):
        entprop.Trainer(make(BatchNormNet), Images(64), growth=MaximumEntropyGrowth)


@pytest.mark.parametrize(
    "options",
    [{"phases": 0}, {"every": 1.5}, {"every": True}, {"unit": "batches"}, {"ascent": 3}, {"augment": "flip"}],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        MaximumEntropyGrowth(**options)


def test_a_progress_bar(tmp_path, capsys):
    growing(tmp_path, unit="epochs", epochs=3, progress=True, images=8).fit()
    shown = capsys.readouterr().err
    assert "growth, phase 1: 100%" in shown
    assert "growth, phase 2: 100%" in shown
