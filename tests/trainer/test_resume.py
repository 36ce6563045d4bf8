"""A run that is interrupted, in whatever way, ends as if it had not been."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from entprop_wrap.errors import CheckpointError
from entprop_wrap.methods import Vanilla
from entprop_wrap.methods.lagged import lagged_state
from entprop_wrap.trainer.run_identity import describe_loss
from tests.faults.accidents import contents, differences, equal, lines
from tests.helpers.trainers import trainer
from tests.trainer import programs

pytestmark = pytest.mark.filterwarnings("ignore:Only . images a step")  # batches are small here


def same(first, second, step=6):
    """Return whether two runs saved the same after a step."""
    name = f"checkpoints/step-{step:08d}"
    return equal(contents(first / name), contents(second / name))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    programs.resumable(folder).fit()
    return folder


def test_a_resumed_run_is_bitwise_the_same(whole, tmp_path):
    for workers in (0, 1):
        folder = tmp_path / str(workers)
        with pytest.raises(KeyboardInterrupt):
            # In the second of the two batches of step 4.
            programs.resumable(folder, workers=workers, stop_after=6).fit()
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert names == ["step-00000002", "step-00000003"]
        # Step 3 ends an epoch: resume in the middle of it, as if the crash had come earlier.
        shutil.rmtree(folder / "checkpoints/step-00000003")
        assert max(line["step"] for line in lines(folder)) == 3
        programs.resumable(folder, workers=workers).fit(resume=True)
        assert differences(whole, folder) == []


def test_images_that_wait_between_lagged_steps_are_resumed_bit_for_bit(tmp_path):
    for kind in programs.LAGGED:
        programs.lagged(tmp_path / "whole" / kind, kind).fit()
    for kind, last in (("plain", 10), ("accumulated", 6)):
        whole, resumed = (tmp_path / name / kind for name in ("whole", "resumed"))
        programs.lagged(resumed, kind).fit(resume=whole / "checkpoints/step-00000002")  # in the middle of an epoch
        waiting = load_file(whole / f"checkpoints/step-{last:08d}/lagged-00000.safetensors")
        assert set(waiting) == {"images", "labels", "partners", "share"}
        assert same(whole, resumed, 3)
        assert same(whole, resumed, last)
        model = "model/model.safetensors"
        assert equal(load_file(whole / model), load_file(resumed / model))


def test_a_run_begins_without_what_waits_for_the_model(tmp_path):
    first = programs.lagged(tmp_path / "first", "plain")
    first.fit()
    assert lagged_state(first.model)
    trainer(tmp_path / "second", first.model, method=Vanilla(), epochs=1).fit()
    assert not lagged_state(first.model)
    assert not list(tmp_path.glob("second/checkpoints/*/lagged-*"))


def test_checkpoint_files_are_split(whole):
    files = contents(whole / "checkpoints/step-00000006")
    names = ("auxiliary.safetensors", "ema.safetensors", "ema_auxiliary.safetensors", "model.safetensors")
    assert sorted(files) == [*names, "optimizer.pt", "process-00000.pt", "state.json"]
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
    (folder / "checkpoints" / "step-00000003.partial").mkdir()  # at a step that the resumed run does not save
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a line cut short

    resumed = programs.short(folder, programs.sgd)
    assert resumed.checkpoints.latest() == folder / "checkpoints/step-00000002"
    resumed.fit(resume=True)
    assert not list((folder / "checkpoints").glob("*.partial"))
    programs.short(tmp_path / "whole", programs.sgd).fit()
    assert differences(tmp_path / "whole", folder) == []


def test_resume_without_checkpoint_begins(tmp_path, caplog):
    run = programs.short(tmp_path)
    with caplog.at_level("INFO"):
        run.fit(resume=True)
    assert "No checkpoint" in caplog.text
    assert run.position.step == 6


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
    longer = programs.short(tmp_path / "a", epochs=5, **constant)
    longer.fit(resume=True)
    assert longer.position.epoch == 5


def test_resume_from_a_path_into_another_folder(tmp_path):
    programs.short(tmp_path / "a").fit()
    programs.short(tmp_path / "b").fit(resume=tmp_path / "a/checkpoints/step-00000002")
    assert same(tmp_path / "a", tmp_path / "b")


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
    other = programs.short(tmp_path, weight_decay=0.1, seed=3, mixed_precision="bf16", log_every=7)
    before = [parameter.clone() for parameter in other.model.parameters()]
    with pytest.raises(CheckpointError) as caught:
        other.fit(resume=True)
    assert "seed: 0 there, 3 here" in str(caught.value)
    assert "precision: 'no' there, 'bf16' here" in str(caught.value)
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
    assert latest.with_name("step-00000006.damaged").exists()
    assert differences(tmp_path / "whole", folder) == []

    for checkpoint in (latest, before):
        (checkpoint / "model.safetensors").write_bytes(b"")
    resumed = programs.short(folder)
    resumed.fit(resume=folder / "checkpoints/step-00000002")  # all later ones are damaged
    assert same(folder, tmp_path / "whole")
    for checkpoint in resumed.checkpoints.all():
        (checkpoint / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="Passing"), pytest.raises(CheckpointError, match="All 3 checkpoints"):
        programs.short(folder).fit(resume=True)


def test_a_damaged_old_checkpoint_does_not_stop_a_run(tmp_path):
    run = programs.short(tmp_path, keep_last=1)
    evaluate = run.evaluate

    def damaging():
        for path in run.checkpoints.all()[:-1]:
            (path / "state.json").write_bytes(b"\0\0")
        return evaluate()

    run.evaluate = damaging
    run.fit()
    assert run.checkpoints.latest().name == "step-00000006"


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
    assert differences(tmp_path / "whole", tmp_path / "run") == []


class Other(programs.GroupNormNet):
    """The same keys, shapes and number of weights as GroupNormNet."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.GroupNorm(4, 8)


Other.__name__ = "GroupNormNet"


def test_another_architecture_and_other_images_are_refused(tmp_path):
    programs.short(tmp_path).fit()
    for change, message in (({"model": Other}, "modules: "), ({"images": programs.Images(seed=5)}, "data: .*pixels")):
        with pytest.raises(CheckpointError, match=message):
            programs.short(tmp_path, **change).fit(resume=True)


def test_other_options_of_loader_loss_and_optimizer_and_other_frozen_parameters_are_refused(tmp_path):
    def run(batch_size=12, smoothing=0.1, betas=(0.9, 0.99), frozen=False, moved=False):
        model = programs.make(programs.GroupNormNet)
        model.fc.bias.requires_grad_(not frozen)
        loader = DataLoader(programs.Images(), batch_size, drop_last=True)
        loss = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)

        def adam(groups):
            groups[1]["params"] += [groups[0]["params"].pop()] if moved else []
            return torch.optim.AdamW(groups, betas=betas)

        return trainer(tmp_path, model, loader, method=Vanilla(), loss=loss, epochs=1, optimizer=adam)

    run().fit()
    for change, message in (
        ({"batch_size": 13}, "batch_size: 12 there, 13 here"),  # three batches, too
        ({"smoothing": 0.2}, r"loss: .*'label_smoothing': 0.1.* there, .*'label_smoothing': 0.2"),
        ({"betas": (0.9, 0.9)}, "groups: "),
        ({"moved": True}, "groups: "),
        ({"frozen": True}, "trainable: "),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(**change).fit(resume=True)
    run().fit(resume=True)


def test_a_refused_resume_changes_nothing(tmp_path):
    programs.short(tmp_path).fit()
    run = programs.short(tmp_path)
    path = run.checkpoints.latest()
    wrong = load_file(path / "auxiliary.safetensors")
    save_file({key: value[:1] for key, value in wrong.items()}, path / "auxiliary.safetensors")
    run.checkpoints._write_state(path, run._state, {})  # as if this had been written
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match=r"does not fit GroupNormNet: 2 weights differ, such as .*\(1,\) there"):
        run.fit(resume=path)
    assert equal(before, run.model.state_dict())
    assert run.position.step == 0
    assert not run._state.prepared.optimizer.state_dict()["state"]
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
    first = tmp_path / "checkpoints/step-00000002"
    programs.short(tmp_path / "resumed", optimizer, schedule=schedule).fit(resume=first)
    assert same(tmp_path, tmp_path / "resumed")


def test_a_number_of_passes_may_be_of_numpy(tmp_path):
    class Own(Vanilla):
        def step(self, step):
            return replace(super().step(step), passes=np.float64(1))

    trainer(tmp_path, method=Own(), epochs=1, save_every_steps=1).fit()


def test_what_cannot_be_read_back_stops_the_run_at_its_first_checkpoint(tmp_path):
    class Arrays(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "rates": np.ones(2)}

    run = programs.short(tmp_path, lambda groups: Arrays(groups, lr=0.05))
    with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be read \(Unsupported global: GLOBAL numpy.*\)"):
        run.fit()
    assert run.position.step == 2
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_state_of_a_loss_is_described_in_short():
    one, other = (describe_loss(torch.nn.CrossEntropyLoss(torch.full((1000,), weight))) for weight in (1.0, 2.0))
    assert one != other
    assert len(one) < 200


def test_a_run_interrupted_in_its_first_step_does_not_begin_again_with_what_that_left(tmp_path):
    run = programs.resumable(tmp_path, stop_after=1)  # in the second of two batches, with statistics of the first
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert run.position.step == 0
    with pytest.raises(CheckpointError, match="has trained already"):
        run.fit(resume=True)


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        programs.short(tmp_path / "run").fit(resume=tmp_path / "nowhere")
