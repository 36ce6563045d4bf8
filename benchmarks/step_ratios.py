"""What a step of each method takes next to a vanilla step: wall time, in turns, so that the machine's moods cancel."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.utils.data import DataLoader

import entprop_wrap as entprop
from entprop_wrap.methods import Vanilla


def times(runs: Any, settings: list[Any], rounds: int) -> None:
    """Time each method's step next to a vanilla step, in turns, and note the ratios of wall time."""
    for setting in dict.fromkeys(settings):
        if ratio_of(runs, setting, rounds) is None:
            plain, ours = stepper(runs, setting.recipe, Vanilla()), stepper(runs, setting.recipe, setting.method)
            ratios = []
            for turn in range(rounds + 3):
                # Whoever goes first finds other caches: take turns.
                first, second = (plain, ours) if turn % 2 else (ours, plain)
                one, two = first(), second()
                ratios.append(two / one if turn % 2 else one / two)
            low, middle, high = statistics.quantiles(ratios[3:], n=4)
            runs.table.add(about(setting, rounds), 0, {"median": middle, "quartiles": [low, high]})


def ratio_of(runs: Any, setting: Any, rounds: int) -> dict[str, Any] | None:
    """Return "median" and "quartiles" of a method's ratios, or None if it has not been timed."""
    return runs.table.find(about(setting, rounds), 0)


def about(setting: Any, rounds: int) -> dict[str, Any]:
    """Return what a timing belongs to."""
    return {"time": setting.method, "recipe": setting.recipe, "rounds": rounds}


def stepper(runs: Any, recipe: Any, method: Any) -> Any:
    """Return a function that takes a training step and returns its seconds."""
    data, _ = runs.data(recipe)
    model = runs.new_model(recipe, 0).train()
    if method.auxiliaries:
        entprop.wrap(model, auxiliaries=method.auxiliaries)
    optimizer = torch.optim.SGD(entprop.parameter_groups(model, weight_decay=1e-4), lr=1e-3, momentum=0.9)
    images, labels = next(iter(DataLoader(data.train, recipe.batch_size, shuffle=True)))

    def step() -> float:
        start = time.perf_counter()
        entprop.training_step(model, images, labels, method=method, pixel_space=data.space)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step
