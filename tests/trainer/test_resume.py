"""A run that is interrupted, in whatever way, ends as if it had not been."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import entprop_wrap as entprop
from entprop_wrap.errors import CheckpointError
from tests.trainer import programs
from tests.trainer.launch import python

pytestmark = pytest.mark.filterwarnings("ignore:Only . images a step")  # batches are small here


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def contents(checkpoint):
    read = {
        ".safetensors": load_file,
        ".pt": lambda path: torch.load(path, weights_only=True),
        ".json": lambda path: json.loads(path.read_text()),
    }
    return {path.name: read[path.suffix](path) for path in checkpoint.iterdir()}


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        line.pop("images_per_second", None)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    programs.resumable(folder).fit()
    return folder


def test_resume_in_a_new_process_is_bitwise(whole, tmp_path):
    folders = [tmp_path / "plain", tmp_path / "workers"]
    for folder in folders:
        with pytest.raises(KeyboardInterrupt):
            # In the second of the two batches of step 4.
            programs.resumable(folder, workers=int(folder.name == "workers"), stop_after=6).fit()
        names = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert names == ["step-00000002", "step-00000003"]
        # Step 3 ends an epoch: go on from the middle of it, as if the crash had come earlier.
        shutil.rmtree(folder / "checkpoints/step-00000003")
        assert max(line["step"] for line in lines(folder)) == 3
    python("tests.trainer.programs", "resume", *folders)
    for folder in folders:
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


def test_checkpoint_files_are_split(whole):
    files = contents(whole / "checkpoints/step-00000006")
    plain = programs.make(programs.BatchNormNet).state_dict()
    assert files["model.safetensors"].keys() == plain.keys()
    assert files["ema.safetensors"].keys() == plain.keys()
    assert all("entprop_aux" in key for key in files["auxiliary.safetensors"])
    assert files["state.json"]["step"] == 6


def test_killed_while_saving(tmp_path):
    folder = tmp_path / "killed"
    python("tests.trainer.programs", "die_while_saving", folder, killed=True)
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


@pytest.mark.parametrize("file", ["model.safetensors", "auxiliary.safetensors", "optimizer.pt", "process-00000.pt"])
def test_damaged_files_are_named(tmp_path, file):
    programs.short(tmp_path).fit()
    path = tmp_path / "checkpoints/step-00000006" / file
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=file):
        programs.short(tmp_path).fit(resume=True)
    path.unlink()
    with pytest.raises(CheckpointError, match=file):
        programs.short(tmp_path).fit(resume=True)


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        programs.short(tmp_path / "run").fit(resume=tmp_path / "nowhere")
