"""Checkpoints that a script wrote with plain ``state_dict()``, averages included, made plain again."""

import argparse
import copy
import re
import runpy
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import entprop_wrap as entprop
from entprop_wrap.__main__ import main
from entprop_wrap.wrapping.state_dict import strip_copies
from tests.helpers.norm_nets import Named, toy
from tests.helpers.oracle import perturb


def _wrapped(norm="batch", **options):
    model = entprop.wrap(toy(norm), **options)
    perturb(model)
    return model


def _average(model):
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    return averaged


def _timm(name):
    return lambda model: getattr(pytest.importorskip("timm.utils"), name)(model)


@pytest.mark.parametrize(
    "average",
    [_average, _timm("ModelEmaV2"), _timm("ModelEmaV3"), lambda m: torch.compile(_average(m), backend="eager")],
    ids=["AveragedModel", "ModelEmaV2", "ModelEmaV3", "compiled"],
)
def test_an_average_loads_into_a_plain_model(average):
    model = _wrapped()
    averaged, plain = average(model), toy("batch", seed=5)
    plain.load_state_dict(entprop.main_state_dict(averaged), strict=True)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in plain.state_dict().items())
    entprop.load_auxiliary_state_dict(averaged, entprop.auxiliary_state_dict(model))


# What a script saves, from a model


def _nested(model):
    averaged = _average(model)
    return {
        "model": model.state_dict(),
        "model_ema": averaged.state_dict(),  # torchvision
        "state_dict_ema": copy.deepcopy(model).state_dict(),  # timm
        "nested": {"deeper": {"state_dict": model.state_dict()}},
        "epoch": 3,
        "metric": None,
        "args": argparse.Namespace(lr=0.1, data="images"),
    }


SAVED = {
    "alone": lambda model: model.state_dict(),
    "nested": _nested,
    "data parallel": lambda model: {f"module.{key}": value for key, value in model.state_dict().items()},
    "compiled": lambda model: {"state_dict": torch.compile(model, backend="eager").state_dict()},
}


def _equal(found, expected):
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        same = list(found) == list(expected) and all(_equal(found[key], expected[key]) for key in expected)
        return same and getattr(found, "_metadata", None) == getattr(expected, "_metadata", None)
    return found == expected


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
@pytest.mark.parametrize(
    ("make", "auxiliaries"),
    [(lambda: toy("batch"), ("weak", "strong")), (Named, ("aux",)), (lambda: nn.BatchNorm1d(8), ("aux",))],
    ids=["toy", "named", "norm"],
)
def test_what_is_left_is_what_the_plain_script_saves(make, auxiliaries, saved):
    plain = make()
    model = entprop.wrap(copy.deepcopy(plain), auxiliaries=auxiliaries)
    perturb(model)
    written = saved(model)
    keys = list(written)
    assert _equal(strip_copies(written), saved(plain))
    assert list(written) == keys
    assert _equal(strip_copies(saved(plain)), saved(plain))


# The command


def test_the_command(tmp_path, monkeypatch, capsys):
    model, plain = _wrapped(), toy("batch", seed=5)
    torch.save(_nested(model), tmp_path / "checkpoint.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["entprop_wrap", "strip", "checkpoint.pth", "plain.pth"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it has been imported before
        runpy.run_module("entprop_wrap", run_name="__main__")
    assert capsys.readouterr().out.startswith("plain.pth: 97 tensors; 64 of auxiliary copies taken out.")
    with torch.serialization.safe_globals([argparse.Namespace]):
        written = torch.load(tmp_path / "plain.pth", weights_only=True)
    plain.load_state_dict(written["model"])
    AveragedModel(plain).load_state_dict(written["model_ema"])
    assert written["args"].lr == 0.1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pth", "plain.pth"]


def test_other_objects_are_read_if_trusted(tmp_path):
    torch.save({"model": _wrapped().state_dict(), "best": np.float64(3)}, tmp_path / "checkpoint.pth")
    main(["strip", "--trust", str(tmp_path / "checkpoint.pth"), str(tmp_path / "plain.pth")])
    toy("batch").load_state_dict(torch.load(tmp_path / "plain.pth", weights_only=False)["model"])


class _Opens:
    def __reduce__(self):
        return open, ("opened", "w")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: torch.save({"model": toy().state_dict()}, file), "holds no auxiliary copies: nothing was"),
        (lambda file: torch.save({"best": np.float64(3)}, file), "holds numpy.*can execute code"),
        (lambda file: torch.save({"model": _Opens()}, file), r"holds .*open.*--trust"),
        (lambda file: file.write_bytes(b"PK\x03\x04 half a file"), "not a checkpoint of torch.save, or is damaged"),
        (lambda file: file.write_bytes(b"text"), "was not read|or is damaged"),
        (lambda file: file.write_bytes(b""), "or is damaged"),
        (lambda file: None, "No such file"),
    ],
    ids=["plain", "numpy", "code", "half", "text", "empty", "missing"],
)
def test_files_that_are_refused(tmp_path, monkeypatch, capsys, write, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "checkpoint.pth")
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main(["strip", str(tmp_path / "checkpoint.pth"), str(tmp_path / "plain.pth")])
    assert stopped.value.code == 1
    printed = capsys.readouterr().err
    assert re.search(message, printed), printed
    assert set(tmp_path.iterdir()) == before
