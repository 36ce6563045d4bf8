"""What users call, with arguments that work: found by signature, so that a new function is fuzzed without more ado."""

import copy
import functools
import importlib
import inspect
import pkgutil
import tempfile
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import entprop_wrap as entprop
from entprop_wrap import diagnostics, robustness
from entprop_wrap.functional import attacks, losses, mixing, uncertainty
from entprop_wrap.methods import entropic_retraining
from entprop_wrap.robustness import corruptions
from entprop_wrap.utils import features

#: Where users import from: every room, and the modules of parts that README and docstrings name.
ROOMS = (
    entprop,
    *(
        importlib.import_module(f"entprop_wrap.{room.name}")
        for room in pkgutil.iter_modules(entprop.__path__)
        if room.name not in ("__main__", "errors", "cli", "utils")
    ),
    attacks,
    corruptions,
    entropic_retraining,
    features,
    uncertainty,
)

#: Public names that are not called with arguments of users.
NOT_CALLED = {
    *("Method", "Step", "StepOutput", "Summary", "Attack", "Mixer", "Gradient", "Uncertainty", "Corruption"),
    *("Features", "Comparison", "Estimate", "RobustnessResult", "Scores"),
    *("DomainGap", "EntropyStages", "FeatureDistance", "InputJacobian", "Interval", "LayerGap"),
    *("OODScore", "SelectionOOD"),
    # Parts of methods, whose arguments were checked by then.
    *("ascend", "check_attack", "normalize_l2", "l2_norm", "uniform_start", "num_selected", "compute_scores", "top_k"),
    *(
        "check_magnitude",
        "activation_entropy",
        "cross_entropy",
        "entropy",
        "least_confidence",
        "logit_margin",
        "random",
    ),
    "two_classes",
}

CLASSES = 5


class Net(nn.Module):
    """As small as a classifier with a norm layer and features can be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.Linear(4, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn(self.conv(images)).tanh().mean((2, 3)))


@functools.cache
def _model(wrapped: bool, training: bool) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    if wrapped:
        entprop.wrap(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model.train(training)


def model(*, wrapped: bool = True, training: bool = False) -> nn.Module:
    """Return a new model, with gradients; a copy of a wrapped one is wrapped."""
    made = copy.deepcopy(_model(wrapped, training))
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    return made


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images ``(N, 3, 32, 32)`` in [0, 1] and labels."""
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(count) % CLASSES


def _data() -> list[Any]:
    return [batch(), batch()]


@functools.cache
def _result() -> robustness.RobustnessResult:
    options: dict[str, Any] = {"corruptions": ("brightness",), "severities": (1,), "progress": False}
    return robustness.evaluate_robustness(model(), _data(), **options)


def _dataset() -> list[Any]:
    return [(image, int(label)) for image, label in zip(*batch(8), strict=True)]


def _optimizer(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), 0.1)


@functools.cache
def folder() -> Path:
    """Return a folder of this process, which is gone with it."""
    _keep.append(tempfile.TemporaryDirectory())
    return Path(_keep[-1].name)


_keep: list[Any] = []

#: Arguments that work, by parameter, or by function and parameter; called with the arguments made before.
GOOD: dict[Any, Callable[..., Any]] = {
    "model": lambda **_: model(),
    "images": lambda **_: batch()[0],
    "labels": lambda **_: batch()[1],
    "data": lambda **_: _data(),
    "progress": lambda **_: False,
    "corruptions": lambda **_: ("brightness",),
    "severities": lambda **_: (1,),
    "severity": lambda **_: 1,
    "weight_decay": lambda **_: 0.1,
    "optimizer": lambda model, **_: _optimizer(model),
    "branches": lambda **_: {"aux": attacks.PGD(steps=1)},
    "source": lambda **_: model(),
    "sa": lambda **_: 0.5,
    "ra": lambda **_: 0.5,
    "path": lambda **_: str(folder() / "report.html"),
    "results": lambda **_: {"a": [_result()], "b": [_result()]},
    "dataset": lambda **_: "pets",
    "dataset_id": lambda **_: "pets",
    "train_data": lambda **_: _dataset(),
    "state": lambda model, **_: entprop.auxiliary_state_dict(model),
    "start": lambda model, **_: copy.deepcopy(entprop.main_state_dict(model)),
    ("linear_probe", "data"): lambda **_: [batch(8), batch(8)],
    "epsilons": lambda **_: (0, 1 / 255),
    "name": lambda **_: "fog",
    ("wrap", "model"): lambda **_: model(wrapped=False),
    ("auxiliary", "name"): lambda **_: "aux",
    ("training_step", "model"): lambda **_: model(training=True),
    ("Trainer", "model"): lambda **_: model(wrapped=False),
    ("Trainer", "config"): lambda **_: entprop.TrainerConfig(
        batch_size=4, output_dir=str(folder() / "run"), progress=False
    ),
    ("Trainer", "optimizer"): lambda **_: None,
    ("TrainerConfig", "optimizer"): lambda **_: "adamw",
    ("model_card", "model"): lambda **_: "net",
    ("model_card", "result"): lambda **_: _result(),
}


@dataclass(frozen=True)
class Target:
    """One public function or class."""

    name: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]

    def hint(self, parameter: str) -> Any:
        """Return the type of a parameter; Any where it cannot be read."""
        described = self.function.__init__ if inspect.isclass(self.function) else self.function
        try:
            return typing.get_type_hints(described).get(parameter, Any)
        except (NameError, TypeError):
            return Any

    def good(self) -> dict[str, Any]:
        """Return arguments that work."""
        made: dict[str, Any] = {}
        for name, parameter in inspect.signature(self.function).parameters.items():
            how = GOOD.get((self.name, name)) or GOOD.get(name)
            if how is not None and name in self.parameters:
                made[name] = how(**{key: value for key, value in made.items() if key == "model"} or {"model": None})
            elif parameter.default is parameter.empty and name in self.parameters:
                raise LookupError(f"GOOD has no {name!r}, which {self.name} needs.")
        return made

    def default(self, parameter: str) -> Any:
        """Return the default of a parameter."""
        return inspect.signature(self.function).parameters[parameter].default


def _target(name: str, function: Callable[..., Any]) -> Target:
    parameters = inspect.signature(function).parameters.values()
    names = tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return Target(name, function, names)


def _all() -> dict[str, Target]:
    found: dict[str, Target] = {}
    seen: set[int] = set()
    for room in ROOMS:
        for name in room.__all__:
            function = getattr(room, name)
            if name in NOT_CALLED or id(function) in seen or not callable(function):
                continue
            seen.add(id(function))
            unique = name if name not in found else f"{room.__name__.rsplit('.')[-1]}.{name}"
            found[unique] = _target(unique, function)
    more = {
        "PixelSpace.from_processor": entprop.PixelSpace.from_processor,
        "PixelSpace.from_timm": entprop.PixelSpace.from_timm,
        "RobustnessResult.from_dict": robustness.RobustnessResult.from_dict,
        "RobustnessResult.mce": _result().mce,
        "Monitor.update": lambda step: diagnostics.Monitor(every=1).update(step),
        "Monitor.evaluated": lambda metrics: diagnostics.Monitor().evaluated(metrics),
        "PGD.at": robustness.PGD().at,
        "PGD()": robustness.PGD(steps=1),
        "FGSM()": robustness.FGSM(),
        "losses.Regularised": losses.Regularised,
        "CutMix.draw": lambda generator: mixing.CutMix().draw(torch.Size((4, 3, 8, 8)), generator),
    }
    return found | {name: _target(name, function) for name, function in more.items()}


GOOD |= {
    ("PixelSpace.from_processor", "processor"): lambda **_: SimpleNamespace(do_rescale=True),
    ("PixelSpace.from_timm", "model"): lambda **_: {"mean": (0.5,), "std": (0.5,)},
    ("RobustnessResult.from_dict", "data"): lambda **_: _result().to_dict(),
    ("corruption", "imagenet"): lambda **_: (0.1, 0.2, 0.3, 0.4, 0.5),
    ("RobustnessResult.mce", "baseline"): lambda **_: _result(),
    "step": lambda **_: entprop.training_step(model(training=True), *batch()),
    "metrics": lambda **_: {"loss": 1.0},
    "epsilon": lambda **_: 2 / 255,
    "checkpoint": lambda **_: {"model": model().state_dict()},
    "uncertainty": lambda **_: "entropy",
    "loss": lambda **_: torch.nn.functional.cross_entropy,
    "generator": lambda **_: None,
}

TARGETS = _all()
