"""Two gloo processes equal one, in weights, metrics and evaluation, and fail together."""

import pytest
import torch
from safetensors.torch import load_file

from entprop_wrap.methods import grow
from tests.faults.accidents import lines
from tests.helpers.processes import run_processes
from tests.helpers.trainer_toys import BatchNormNet, Images, make
from tests.trainer import programs

pytestmark = pytest.mark.filterwarnings("ignore:Only . images a step")  # batches are small here


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return where two processes have written all that they do here."""
    folder = tmp_path_factory.mktemp("processes")
    for name in ("two", "grown", "failing", "differing"):
        (folder / name).mkdir()
    run_processes(programs.together, folder, group=False)
    return folder


def differing(folder, rank):
    return (folder / "differing" / f"found-{rank}").read_text().splitlines()


def test_two_processes_equal_one(folder):
    programs.distributed(folder / "one", accumulation=2)
    for run in ("vanilla", "entprop", "accumulated"):
        step = {"vanilla": 8, "entprop": 8, "accumulated": 4}[run]
        one, two = (folder / place / run / f"checkpoints/step-{step:08d}" for place in ("one", "two"))
        files = sorted(path.name for path in one.glob("*.safetensors"))
        assert files == sorted(path.name for path in two.glob("*.safetensors"))
        assert len(files) == {"vanilla": 1, "entprop": 4, "accumulated": 2}[run]
        for name in files:
            torch.testing.assert_close(load_file(one / name), load_file(two / name), rtol=1e-4, atol=1e-6)
        for first, second in zip(lines(folder / "one" / run), lines(folder / "two" / run), strict=True):
            assert first.keys() == second.keys()
            for key, value in first.items():
                same = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)
                assert second[key] == same, f"{run} step {first['step']} {key}"
            if first["kind"] == "eval":  # 43 samples: a repetition or an omission would change the denominator
                assert second["accuracy"] * 43 == pytest.approx(round(second["accuracy"] * 43))
        assert sorted(path.name for path in two.glob("process-*")) == ["process-00000.pt", "process-00001.pt"]


def test_two_processes_grow_a_share_of_the_data_each(folder):
    found = [torch.load(folder / "grown" / f"grown-{rank}.pt") for rank in (0, 1)]
    for key in ("images", *found[0]["model"]):
        first, second = (part["images"] if key == "images" else part["model"][key] for part in found)
        assert torch.equal(first, second), key
    model = make(BatchNormNet)
    model.load_state_dict(found[0]["model"])
    alone = grow(model, Images(20), ascent=programs.ASCENT, batch_size=3, progress=False)
    assert torch.equal(alone.datasets[1].images, found[0]["images"])


def test_a_failure_on_one_process_is_raised_on_all(folder):
    one, two = ((folder / "failing" / f"found-{rank}").read_text().splitlines() for rank in (0, 1))
    data, loss, saved, accuracy, full = two
    assert data == "DataError: eval_data[13] raised Unsendable: no such file"
    assert (loss, saved) == ("Unsendable: no such loss", "step-00000004")
    assert one == [data, f"RuntimeError: {loss}", saved, accuracy, full]
    assert full.startswith("CheckpointError: ")
    assert "step-00000001 cannot be written" in full


@pytest.mark.parametrize("rank", [0, 1])
def test_data_that_differs_between_processes_is_refused(folder, rank):
    """A share of the data would be shared out again; splits without a seed would be mixed."""
    for line in differing(folder, rank)[:2]:
        assert line.startswith("DataError: train_data: the 2 processes have different samples.")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_that_is_not_finite_on_one_process_reaches_no_weight(folder, rank):
    assert differing(folder, rank)[2].startswith("DivergedError: The loss was not finite up to step 3.")


@pytest.mark.parametrize("rank", [0, 1])
def test_parameters_that_get_no_gradient_are_refused_in_words(folder, rank):
    assert differing(folder, rank)[3].startswith("UnsupportedModelError: The loss does not depend on all parameters")


def test_processes_whose_lagged_steps_differ_log_the_same_averages(folder):
    assert len(differing(folder, 0)) == len(differing(folder, 1)) == 4
    each, four = (lines(folder / "differing" / f"sizes{every}", "train") for every in (1, 4))
    assert [line["step"] for line in each] == [1, 2, 3, 4]
    for key in ("loss", "main_loss", "main_entropy", "passes"):
        assert four[0][key] == pytest.approx(sum(line[key] for line in each) / 4, rel=1e-5)
