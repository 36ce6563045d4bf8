"""Options: every problem at once, and what each option does to a run is in test_options.py."""

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from entprop_wrap import TrainerConfig
from entprop_wrap.errors import ConfigurationError

BAD = {
    "epochs": 0,
    "batch_size": 1,
    "eval_batch_size": 0,
    "optimizer": "adamW",
    "learning_rate": 0.0,
    "momentum": 1.0,
    "weight_decay": -1e-4,
    "schedule": "cosin",
    "warmup": 1.0,
    "mixed_precision": "fp8",
    "gradient_accumulation_steps": 0,
    "max_grad_norm": 0.0,
    "channels_last": "yes",
    "compile": 1,
    "ema_decay": 1.0,
    "seed": -1,
    "workers": True,
    "log_every": 0,
    "evaluate_every": 0,
    "save_every": 0,
    "save_every_steps": 0,
    "keep_last": 0,
    "keep_best": "acc",
    "progress": None,
    "output_dir": None,
    "project": "",
}

#: Of the wrong type altogether, for every option but those that take functions or objects.
NONSENSE = ["", "abc", float("nan"), float("inf"), 1j, [], np.ones(2), torch.ones(2), object(), b"1", np.float32("nan")]


@pytest.mark.parametrize("name", BAD)
def test_each_range(name):
    with pytest.raises(ConfigurationError, match=name):
        TrainerConfig(**{name: BAD[name]})


@pytest.mark.parametrize("name", BAD)
def test_nonsense(name):
    for value in NONSENSE:
        if not (isinstance(value, str) and name in ("output_dir", "project") and value):
            with pytest.raises(ConfigurationError, match=f"{name} must be"):
                TrainerConfig(**{name: value})


def test_numbers_of_numpy_become_python_s():
    config = TrainerConfig(
        epochs=np.int64(3), learning_rate=np.float32(0.1), weight_decay=np.logspace(-3, -1, 3)[1], compile=np.bool_(0)
    )
    assert type(config.epochs) is int
    assert type(config.learning_rate) is type(config.weight_decay) is float
    assert config.compile is False


def test_all_problems_at_once():
    with pytest.raises(ConfigurationError) as caught:
        TrainerConfig(**BAD)
    assert all(name in str(caught.value) for name in BAD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2**31 + 1}, "at most 2147483648"),  # which is what NumPy takes
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0, found nan"),
        (
            {"optimizer": torch.optim.SGD([torch.ones(1)], lr=0.1)},
            r"Trainer\(\.\.\., optimizer=optimizer\)",
        ),
        ({"save_every": None, "save_every_steps": 3}, "turns checkpoints off"),
    ],
)
def test_what_a_message_says(options, message):
    with pytest.raises(ConfigurationError, match=message):
        TrainerConfig(**options)


def test_the_output_folder_may_be_of_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert TrainerConfig(output_dir="~/runs").output_dir == "/home/me/runs"
    assert TrainerConfig(output_dir=Path("~/runs")).output_dir == Path("/home/me/runs")


def test_every_option_is_documented():
    for field in dataclasses.fields(TrainerConfig):
        assert f"\n    {field.name}: " in inspect.cleandoc(TrainerConfig.__doc__)
