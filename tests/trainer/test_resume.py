"""A run that is interrupted, in whatever way, ends as if it had not been."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

import entprop_wrap as entprop
from entprop_wrap.errors import CheckpointError
from entprop_wrap.methods import Vanilla
from entprop_wrap.methods.lagged import lagged_state
from entprop_wrap.trainer.run_identity import describe_loss
from tests.faults.accidents import equal, lines
from tests.trainer import programs

pytestmark = pytest.mark.filterwarnings("ignore:Only . images a step")  # batches are small here


def contents(checkpoint):
    read = {
        ".safetensors": load_file,
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".json": lambda path: json.loads(path.read_text()),
    }
    found = {path.name: read[path.suffix](path) for path in checkpoint.iterdir()}
    for key in ("files", "sha256"):  # of pickles, whose bytes may differ
        del found["state.json"][key]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    programs.resumable(folder).fit()
    return folder


def test_a_resumed_run_is_bitwise_the_same(whole, tmp_path):
    folders = [tmp_path / "plain", tmp_path / "workers"]
    for folder in folders:
        with pytest.raises(KeyboardInterrupt):
            # In the second of the two batches of step 4.
            programs.resumable(folder, workers=int(folder.name == "workers"), stop_after=6).fit()
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert names == ["step-00000002", "step-00000003"]
        # Step 3 ends an epoch: resume in the middle of it, as if the crash had come earlier.
        shutil.rmtree(folder / "checkpoints/step-00000003")
        assert max(line["step"] for line in lines(folder)) == 3
    for folder in folders:
        programs.resumable(folder, workers=int(folder.name == "workers")).fit(resume=True)
        for step in (4, 6):
            name = f"checkpoints/step-{step:08d}"
            first, second = contents(whole / name), contents(folder / name)
            assert set(first) == {
                "model.safetensors",
                "auxiliary.safetensors",
                "ema.safetensors",
                "ema_auxiliary.safetensors",
                "optimizer.pt",
                "process-00000.pt",
                "state.json",
            }
            for file in first:
                assert equal(first[file], second[file]), f"{folder.name} {name}/{file}"
        assert lines(folder) == lines(whole)
        exported = load_file(folder / "model/model.safetensors")
        assert equal(exported, load_file(whole / "model/model.safetensors"))


def test_images_that_wait_between_lagged_steps_are_resumed_bit_for_bit(tmp_path):
    for kind in programs.LAGGED:
        programs.lagged(tmp_path / "whole" / kind, kind).fit()
    for kind, last in (("plain", 10), ("accumulated", 6)):
        second = programs.lagged(tmp_path / "resumed" / kind, kind)
        second.fit(resume=tmp_path / "whole" / kind / "checkpoints/step-00000002")  # in the middle of an epoch
        whole, resumed = (tmp_path / name / kind for name in ("whole", "resumed"))
        for step in (3, last):
            first, second = (contents(folder / f"checkpoints/step-{step:08d}") for folder in (whole, resumed))
            assert set(first["lagged-00000.safetensors"]) == {"images", "labels", "partners", "share"}
            assert equal(first, second), f"{kind}, step {step}"
        model = "model/model.safetensors"
        assert equal(load_file(whole / model), load_file(resumed / model))


def test_a_run_begins_without_what_waits_for_the_model(tmp_path):
    first = programs.lagged(tmp_path / "first", "plain")
    first.fit()
    assert lagged_state(first.model)
    config = entprop.TrainerConfig(epochs=1, batch_size=20, output_dir=tmp_path / "second", progress=False)
    entprop.Trainer(first.model, programs.Images(), method=Vanilla(), config=config).fit()
    assert not lagged_state(first.model)
    assert not list(tmp_path.glob("second/checkpoints/*/lagged-*"))


def test_checkpoint_files_are_split(whole):
    files = contents(whole / "checkpoints/step-00000006")
    plain = programs.make(programs.BatchNormNet).state_dict()
    assert files["model.safetensors"].keys() == plain.keys()
    assert files["ema.safetensors"].keys() == plain.keys()
    assert all("entprop_aux" in key for key in files["auxiliary.safetensors"])
    assert files["state.json"]["step"] == 6


def test_killed_while_saving(tmp_path):
    class Killed(BaseException):
        """Leaves behind what a kill does: nothing is tidied up."""

    class SGD(torch.optim.SGD):
        def state_dict(self):
            if (folder / "checkpoints" / "step-00000002").exists():
                raise Killed
            return super().state_dict()

    folder = tmp_path / "killed"
    dying = programs.short(folder, lambda groups: SGD(groups, lr=0.05, momentum=0.9))
    with pytest.raises(Killed):
        dying.fit()
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004.partial"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a line cut short

    trainer = programs.short(folder, programs.sgd)
    assert trainer.checkpoints.latest() == folder / "checkpoints/step-00000002"
    trainer.fit(resume=True)
    assert not list((folder / "checkpoints").glob("*.partial"))

    programs.short(tmp_path / "whole", programs.sgd).fit()
    last = "checkpoints/step-00000006"
    assert equal(contents(folder / last), contents(tmp_path / "whole" / last))
    assert lines(folder) == lines(tmp_path / "whole")


def test_resume_without_checkpoint_begins(tmp_path, caplog):
    trainer = programs.short(tmp_path)
    with caplog.at_level("INFO"):
        trainer.fit(resume=True)
    assert "No checkpoint" in caplog.text
    assert trainer.position.step == 6


def test_a_finished_run_has_nothing_left(tmp_path):
    result = programs.short(tmp_path).fit()
    before = lines(tmp_path)
    again = programs.short(tmp_path)
    assert again.fit(resume=True) == result
    assert lines(tmp_path) == before
    assert again.fit(resume=True) == result  # the same Trainer, too


def test_a_constant_rate_can_be_prolonged(tmp_path):
    constant = {"schedule": "constant", "warmup": 0.0}
    programs.short(tmp_path / "a", **constant).fit()
    config = entprop.TrainerConfig(
        epochs=5, batch_size=20, optimizer="sgd", output_dir=tmp_path / "a", progress=False, keep_last=None, **constant
    )
    model = programs.make(programs.GroupNormNet)
    method = entprop.EntProp(mix=None)
    longer = entprop.Trainer(model, programs.Images(), programs.Images(), method=method, config=config)
    longer.fit(resume=True)
    assert longer.position.epoch == 5


def test_resume_from_a_path_into_another_folder(tmp_path):
    programs.short(tmp_path / "a").fit()
    trainer = programs.short(tmp_path / "b")
    trainer.fit(resume=tmp_path / "a/checkpoints/step-00000002")
    last = "checkpoints/step-00000006"
    assert equal(contents(tmp_path / "a" / last), contents(tmp_path / "b" / last))


def test_nothing_is_overwritten(tmp_path):
    programs.short(tmp_path).fit()
    with pytest.raises(CheckpointError, match=r"fit\(resume=True\)"):
        programs.short(tmp_path).fit()
    with pytest.raises(CheckpointError, match="would contradict"):
        programs.short(tmp_path).fit(resume=tmp_path / "checkpoints/step-00000002")
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="metrics of another run"):
        programs.short(tmp_path).fit()


def test_another_run_is_refused_with_all_differences(tmp_path):
    programs.short(tmp_path).fit()
    other = programs.short(tmp_path, weight_decay=0.1, seed=3, log_every=7)
    before = [parameter.clone() for parameter in other.model.parameters()]
    with pytest.raises(CheckpointError) as caught:
        other.fit(resume=True)
    assert "seed: 0 there, 3 here" in str(caught.value)
    assert "groups" in str(caught.value)
    assert "log_every" not in str(caught.value)
    assert all(map(torch.equal, before, other.model.parameters()))


def test_a_damaged_latest_checkpoint_is_passed_over(tmp_path):
    programs.short(tmp_path / "whole").fit()
    folder = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", folder)
    latest, before = (folder / f"checkpoints/step-{step:08d}" for step in (6, 4))
    (latest / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        programs.short(folder).fit(resume=latest)
    with pytest.raises(CheckpointError, match="step-00000004, which a run from"):
        programs.short(folder).fit(resume=folder / "checkpoints/step-00000002")
    with pytest.warns(UserWarning, match=r"Passing over.*optimizer\.pt"):
        programs.short(folder).fit(resume=True)
    assert equal(contents(latest), contents(tmp_path / "whole/checkpoints/step-00000006"))
    assert latest.with_name("step-00000006.damaged").exists()
    assert lines(folder) == lines(tmp_path / "whole")

    for checkpoint in (latest, before):
        (checkpoint / "model.safetensors").write_bytes(b"")
    trainer = programs.short(folder)
    trainer.fit(resume=folder / "checkpoints/step-00000002")  # all later ones are damaged
    assert equal(contents(latest), contents(tmp_path / "whole/checkpoints/step-00000006"))
    for checkpoint in trainer.checkpoints.all():
        (checkpoint / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="Passing"), pytest.raises(CheckpointError, match="All 3 checkpoints"):
        programs.short(folder).fit(resume=True)


def test_a_damaged_old_checkpoint_does_not_stop_a_run(tmp_path):
    trainer = programs.short(tmp_path)
    evaluate = trainer.evaluate

    def damaging():
        for path in trainer.checkpoints.all()[:-1]:
            (path / "state.json").write_bytes(b"\0\0")
        return evaluate()

    trainer.evaluate = damaging
    trainer.checkpoints.keep_last = 1
    trainer.fit()
    assert trainer.position.step == 6
    assert trainer.checkpoints.latest().name == "step-00000006"


@pytest.mark.parametrize("epoch", [1, 3])
def test_an_evaluation_that_fails_does_not_lose_the_epoch(tmp_path, epoch):
    programs.short(tmp_path / "whole").fit()
    trainer = programs.short(tmp_path / "run")
    evaluate = trainer.evaluate

    def failing():
        if trainer.position.epoch == epoch:
            raise OSError("unreachable")
        return evaluate()

    trainer.evaluate = failing
    with pytest.raises(OSError, match="unreachable"):
        trainer.fit()
    assert trainer.checkpoints.latest().name == f"step-{2 * epoch:08d}"
    programs.short(tmp_path / "run").fit(resume=True)
    for step in (2, 4, 6):
        name = f"checkpoints/step-{step:08d}"
        assert equal(contents(tmp_path / "run" / name), contents(tmp_path / "whole" / name))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


class Other(programs.GroupNormNet):
    """The same keys, shapes and number of weights as GroupNormNet."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.GroupNorm(4, 8)


Other.__name__ = "GroupNormNet"


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [(Other, {}, "modules: "), (programs.GroupNormNet, {"seed": 5}, "data: .*pixels")],
)
def test_another_architecture_and_other_images_are_refused(tmp_path, model, data, message):
    programs.short(tmp_path).fit()
    config = entprop.TrainerConfig(
        epochs=3, batch_size=20, optimizer="sgd", output_dir=tmp_path, progress=False, keep_last=None
    )
    images, method = programs.Images(**data), entprop.EntProp(mix=None)
    other = entprop.Trainer(programs.make(model), images, images, method=method, config=config)
    with pytest.raises(CheckpointError, match=message):
        other.fit(resume=True)


def test_other_options_of_loader_loss_and_optimizer_and_other_frozen_parameters_are_refused(tmp_path):
    def run(batch_size=12, smoothing=0.1, betas=(0.9, 0.99), frozen=False):
        model = programs.make(programs.GroupNormNet)
        model.fc.bias.requires_grad_(not frozen)
        loader = DataLoader(programs.Images(), batch_size, drop_last=True)
        loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
        config = entprop.TrainerConfig(
            epochs=1,
            optimizer=lambda groups: torch.optim.AdamW(groups, betas=betas),
            output_dir=tmp_path,
            progress=False,
        )
        return entprop.Trainer(model, loader, method=Vanilla(), loss=loss, config=config)

    run().fit()
    for change, message in (
        ({"batch_size": 13}, "batch_size: 12 there, 13 here"),  # three batches, too
        ({"smoothing": 0.2}, r"loss: .*'label_smoothing': 0.1.* there, .*'label_smoothing': 0.2"),
        ({"betas": (0.9, 0.9)}, "groups: "),
        ({"frozen": True}, "trainable: "),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(**change).fit(resume=True)
    run().fit(resume=True)


def test_a_refused_resume_changes_nothing(tmp_path):
    programs.short(tmp_path).fit()
    trainer = programs.short(tmp_path)
    path = trainer.checkpoints.latest()
    wrong = load_file(path / "auxiliary.safetensors")
    save_file({key: value[:1] for key, value in wrong.items()}, path / "auxiliary.safetensors")
    trainer.checkpoints._write_state(path, trainer._state, {})  # as if this had been written
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match=r"does not fit GroupNormNet: 2 weights differ, such as .*\(1,\) there"):
        trainer.fit(resume=path)
    assert equal(before, trainer.model.state_dict())
    assert trainer.position.step == 0
    assert not trainer._state.prepared.optimizer.state_dict()["state"]
    assert files == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


# Numbers of NumPy and of torch ----------------------------------------------------------------------------------------


def numpy_rates(groups):
    return torch.optim.SGD(groups, lr=np.float32(0.05), momentum=np.float64(0.9), weight_decay=np.float32(1e-3))


def tensor_rate(groups):
    return torch.optim.SGD(groups, lr=torch.tensor(0.05), momentum=0.9)


def cosine(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.cos(step / steps))


def exponential(optimizer, steps):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, np.float32(0.9))


def milestones(optimizer, steps):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [(numpy_rates, cosine), (numpy_rates, exponential), (tensor_rate, exponential), (programs.sgd, milestones)],
)
def test_scalars_of_numpy_and_torch_resume(tmp_path, optimizer, schedule):
    programs.short(tmp_path, optimizer, schedule=schedule).fit()
    last = tmp_path / "checkpoints/step-00000006"
    whole = contents(last)
    for name in ("step-00000004", "step-00000006"):
        shutil.rmtree(tmp_path / "checkpoints" / name)
    programs.short(tmp_path, optimizer, schedule=schedule).fit(resume=True)
    assert equal(contents(last), whole)


def test_what_cannot_be_read_back_stops_the_run_at_its_first_checkpoint(tmp_path):
    class Arrays(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "rates": np.ones(2)}

    trainer = programs.short(tmp_path, lambda groups: Arrays(groups, lr=0.05))
    with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be read \(Unsupported global: GLOBAL numpy.*\)"):
        trainer.fit()
    assert trainer.position.step == 2
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_state_of_a_loss_is_described_in_short():
    one, other = (describe_loss(torch.nn.CrossEntropyLoss(torch.full((1000,), weight))) for weight in (1.0, 2.0))
    assert one != other
    assert len(one) < 200


def test_a_run_interrupted_in_its_first_step_does_not_begin_again_with_what_that_left(tmp_path):
    trainer = programs.resumable(tmp_path, stop_after=1)  # in the second of two batches, with statistics of the first
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.position.step == 0
    with pytest.raises(CheckpointError, match="has trained already"):
        trainer.fit(resume=True)


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        programs.short(tmp_path / "run").fit(resume=tmp_path / "nowhere")
