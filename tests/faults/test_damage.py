"""Each file of a checkpoint damaged in each way: an earlier checkpoint and a warning, or an error; never silence."""

import random
import shutil
from collections import Counter

import pytest

from entprop_wrap.trainer.checkpoint import CheckpointFolder
from tests.faults import accidents

pytestmark = pytest.mark.filterwarnings("ignore:Only . images a step")  # batches are small here


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    accidents.run(folder).fit()
    return folder


@pytest.mark.parametrize("named", [False, True], ids=["latest", "by path"])
def test_no_damage_is_silent(whole, named):
    checkpoints, counts, draws = CheckpointFolder(whole / "checkpoints", 3, None), Counter(), random.Random(0)
    for _ in range(10):
        for file, damage in accidents.damaged(whole, draws):
            found = accidents.outcome(lambda: checkpoints.to_resume(checkpoints.latest() if named else True))
            assert found == ("error" if named else "fallback"), f"{damage} in {file}: {found}"
            counts[found] += 1
    print(f"\nDamage: {dict(counts)}")
    assert sum(counts.values()) == 10 * 8 * len(accidents.DAMAGES)
    assert accidents.outcome(lambda: checkpoints.to_resume(True)) == "silent"  # whole again


def test_a_run_that_falls_back_ends_the_same(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for file, damage in accidents.damaged(tmp_path / "run", random.Random(1)):
        if (file, damage) == ("model.safetensors", "bit flip"):
            assert accidents.outcome(lambda: accidents.run(tmp_path / "run").fit(resume=True)) == "fallback"
            assert accidents.differences(whole, tmp_path / "run") == []
            break
