"""Options: every problem at once, and what each option does to a run is in test_options.py."""

import dataclasses
import inspect

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
}


@pytest.mark.parametrize("name", BAD)
def test_each_range(name):
    with pytest.raises(ConfigurationError, match=name):
        TrainerConfig(**{name: BAD[name]})


def test_all_problems_at_once():
    with pytest.raises(ConfigurationError) as caught:
        TrainerConfig(**BAD)
    assert all(name in str(caught.value) for name in BAD)


def test_no_number_is_no_number():
    with pytest.raises(ConfigurationError, match="learning_rate must be above 0, found nan"):
        TrainerConfig(learning_rate=float("nan"))


def test_a_ready_optimizer_goes_to_the_trainer():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ConfigurationError, match=r"Trainer\(\.\.\., optimizer=optimizer\)"):
        TrainerConfig(optimizer=optimizer)


def test_saving_steps_need_saving():
    with pytest.raises(ConfigurationError, match="turns checkpoints off"):
        TrainerConfig(save_every=None, save_every_steps=3)


def test_every_option_is_documented():
    for field in dataclasses.fields(TrainerConfig):
        assert f"\n    {field.name}: " in inspect.cleandoc(TrainerConfig.__doc__)
