"""The whole comparison: each method with each seed, then scores of all of them on the same images."""

from __future__ import annotations

import json
from argparse import Namespace
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn
from torch.utils.data import DataLoader

from entprop_wrap.cli import methods as method_parts
from entprop_wrap.cli import models as model_parts
from entprop_wrap.cli import results
from entprop_wrap.cli.data import Data, load, say
from entprop_wrap.cli.options import run_folder
from entprop_wrap.data.augmentation import AugmentedImages
from entprop_wrap.errors import CheckpointError, ConfigurationError
from entprop_wrap.finetuning import interpolate, linear_probe
from entprop_wrap.methods import FastAdvProp, grow
from entprop_wrap.robustness import PGD, evaluate_robustness
from entprop_wrap.trainer import Trainer, TrainerConfig
from entprop_wrap.utils.files import explaining_failed_writes, replacing
from entprop_wrap.utils.modules import evaluating
from entprop_wrap.wrapping.model import ensure_wrapped, unwrap

#: Options that say which weights a run starts from, and the file in its folder that keeps them.
START = ("model", "pretrained", "weights", "linear_probe")
START_FILE = "start.json"


def run(options: Namespace) -> None:
    """Train, evaluate, and write down. What does not fit raises before anything is trained."""
    epsilon = options.attack
    attacks = {} if epsilon is None else {f"PGD-20 {255 * epsilon:g}/255": PGD(epsilon, steps=20)}
    methods = method_parts.build(options)
    settings = config(options)
    for name, method in methods.items():
        phases(name, method, options)
    blueprint = model_parts.find(options)
    data = load(options, blueprint.space, blueprint.size)
    if options.augment != "none":
        data.train = AugmentedImages(data.train, options.augment, data.space)

    def build() -> nn.Module:
        try:
            model = blueprint.build(data.classes)
        except OSError as error:  # of every library that downloads
            raise ConfigurationError(
                f"--model {options.model}: its pretrained weights could not be loaded ({str(error).splitlines()[0]}). "
                "Expected a connection, or weights that were downloaded before; --weights takes a file."
            ) from error
        return model_parts.start_from(model, options.weights)

    # Weights or images that do not fit, and norm layers with nothing to copy for a method, raise here.
    model = build()
    check_size(model, data, blueprint, options)
    for method in methods.values():
        if ensure_wrapped(model, method):
            unwrap(model)
    seeds = range(options.seed, options.seed + options.seeds)
    for folder in (run_folder(options, name, seed) for seed in seeds for name in methods):
        check_start(folder, options)
    if options.linear_probe:
        unchanged = DataLoader(data.unchanged, options.eval_batch_size, num_workers=options.workers)
        accuracy = linear_probe(model.to(accelerate.PartialState().device), unchanged)
        say(f"the fitted head alone has an accuracy of {accuracy:.1%} on a fifth of the training images, held out")
    runs: list[results.Run] = []
    for seed in seeds:
        trained = {}
        for name, method in methods.items():
            accelerate.utils.set_seed(seed)
            own = replace(settings, seed=seed, output_dir=run_folder(options, name, seed))
            start = deepcopy(model) if options.linear_probe else build()  # a fitted head is that of every run
            one, trained[name] = train(name, method, start, data, own, options)
            runs.append(one)
        scores = evaluate_robustness(
            trained,
            DataLoader(data.test, options.eval_batch_size, num_workers=options.workers),
            pixel_space=data.space,
            severities=tuple(options.severities),
            attacks=attacks,
        )
        for one in runs[-len(trained) :]:
            one.scores = scores[one.method]
    if accelerate.PartialState().is_main_process:
        print("\n" + results.table(runs, data))
        results.save(runs, data, options)
        folder = run_folder(options, runs[-1].method, runs[-1].seed) / "model"
        lines = blueprint.load.replace("{folder}", folder.as_posix()).replace("{classes}", str(len(data.classes)))
        print(f"\nThe plain model of {runs[-1].method}, in Python:\n\n{lines}")


def config(options: Namespace) -> TrainerConfig:
    """Return what all runs have in common: the options that have the name of one of the Trainer's."""
    shared = {
        field.name: getattr(options, field.name) for field in fields(TrainerConfig) if hasattr(options, field.name)
    }
    return TrainerConfig(**shared, evaluate_every=max(1, options.epochs // 10))


def train(
    name: str, method: Any, model: nn.Module, data: Data, settings: TrainerConfig, options: Namespace
) -> tuple[results.Run, nn.Module]:
    """Train one model; return the record of the run, and the plain model in evaluation mode.

    ME-ADA's data grows between phases, each with a folder, but for the last, and a schedule of its own. A phase that
    was finished is not trained again when it is resumed; what the data has grown after it is made again.
    """
    output, images = Path(settings.output_dir), data.train
    start = None if options.interpolate is None else deepcopy(model.state_dict())
    lengths = phases(name, method, options)
    for number, epochs in enumerate(lengths, start=1):
        last = number == len(lengths)
        own = replace(settings, epochs=epochs, output_dir=output if last else output / f"phase{number}")
        trainer = Trainer(model, images, data.test, method=method, pixel_space=data.space, config=own)
        if number == 1 and accelerate.PartialState().is_main_process:  # the Trainer has found the folder writable
            with explaining_failed_writes(output / START_FILE):
                output.mkdir(parents=True, exist_ok=True)
                with replacing(output / START_FILE) as partial:
                    partial.write_text(json.dumps(start_of(options)) + "\n")
        trainer.fit(resume=options.resume)
        if not last:
            images = grow(model, images, pixel_space=data.space, workers=own.workers, progress=own.progress)
    found = {}
    if method.auxiliaries and settings.seed == options.seed and accelerate.PartialState().num_processes == 1:
        found = results.diagnose(name, method, trainer.model.eval(), data, options)
    if start is not None:  # after the diagnosis: the copies stay where training left them
        interpolate(trainer.model, start, options.interpolate)
        trainer.export(output / "model")
    if method.auxiliaries:
        unwrap(trainer.model)
    passes, seconds = results.cost(output, settings.batch_size * accelerate.PartialState().num_processes)
    return results.Run(name, settings.seed, passes, seconds, diagnostics=found), trainer.model.eval()


def check_size(model: nn.Module, data: Data, blueprint: model_parts.Blueprint, options: Namespace) -> None:
    """Raise :class:`ConfigurationError` if the model does not take images of the size they have."""
    image = data.test[0][0][None]
    try:
        with evaluating(model), torch.no_grad():
            model(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        said, size = str(error).rstrip("."), image.shape[-1]
        advice = "Leave --image-size out" if options.image_size else f"Write --image-size {blueprint.size}"
        raise ConfigurationError(
            f"--model {options.model} does not take images of {size} px: {said}. {advice}, or choose another --model."
        ) from error


def start_of(options: Namespace) -> dict[str, str]:
    """Return which weights a run starts from, as JSON."""
    return {name: str(getattr(options, name)) for name in START}


def check_start(folder: Path, options: Namespace) -> None:
    """Raise :class:`CheckpointError` if the run in ``folder`` is to be resumed from another start than its own."""
    file, now = folder / START_FILE, start_of(options)
    if options.resume and file.exists() and (began := json.loads(file.read_text())) != now:
        raise CheckpointError(
            f"{folder} began from other weights: {began} there, {now} here. Expected the same options to resume, or "
            "another --output."
        )


def phases(name: str, method: Any, options: Namespace) -> tuple[int, ...]:
    """Return the epochs of each phase of training, after each of which the data grows: one, but for ME-ADA.

    For CIFAR it was published with three, of which the first two take a tenth each.
    """
    if options.equal_cost and isinstance(method, FastAdvProp):
        return (method.equal_cost_epochs(options.epochs),)
    if name != "me_ada_growth":
        return (options.epochs,)
    every = max(1, options.epochs // 10)
    if options.epochs <= 2 * every:
        raise ConfigurationError(f"{name} trains in three phases, found {options.epochs} epochs: choose more epochs.")
    return every, every, options.epochs - 2 * every
