"""A sweep: many short trainings, each once, which trains, evaluates and writes down what is missing.

Trained weights stay in a folder beside the run table, so that models can be evaluated together (images are corrupted
once for all of them), and again later in another way.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import accelerate
import torch
from run_table import RunTable, key_of
from settings import Protocol, Recipe, Setting, part_of, whole_data
from torch import nn
from tqdm.auto import tqdm

import entprop_wrap as entprop
from entprop_wrap import TrainerConfig
from entprop_wrap.robustness import RobustnessResult, evaluate_robustness
from entprop_wrap.train import data as data_parts
from entprop_wrap.train import models as model_parts
from entprop_wrap.train import results
from entprop_wrap.train.options import Options
from entprop_wrap.train.phases import fit, phases_of
from entprop_wrap.train.run import attacks


@dataclass
class Sweep:
    """Runs of several settings over several seeds.

    Attributes:
        folder: Where runs.jsonl and the trained weights are.
        protocol: How models are evaluated.
        together: Models that are evaluated at once.
    """

    folder: Path
    protocol: Protocol
    together: int = 10
    table: RunTable = field(init=False)

    def __post_init__(self) -> None:
        self.table = RunTable(self.folder / "runs.jsonl")
        self._data: dict[Recipe, tuple[data_parts.Data, model_parts.Blueprint]] = {}

    def result(self, setting: Setting, seed: int) -> RobustnessResult | None:
        """Return what the evaluation found, or None if that is still to be done."""
        row = self.table.find({"train": setting, "evaluate": self.protocol}, seed)
        return None if row is None else RobustnessResult.from_dict(row)

    def training(self, setting: Setting, seed: int) -> dict[str, float] | None:
        """Return "seconds" (wall), "cpu_seconds" and "passes" of the training, or None if it is still to be done."""
        return self.table.find({"train": setting}, seed)

    def left(self, settings: Iterable[Setting], seeds: Sequence[int]) -> list[tuple[Setting, int]]:
        """Return the runs that are still to be done, seed by seed: what is done of a seed can be compared."""
        settings = list(dict.fromkeys(settings))
        return [(one, seed) for seed in seeds for one in settings if self.result(one, seed) is None]

    def run(self, settings: Iterable[Setting], seeds: Sequence[int]) -> None:
        """Do everything that is left."""
        left = self.left(settings, seeds)
        with tqdm(total=len(left), desc="Runs", unit="run") as bar:
            for group in _groups(left, self.together):
                for setting, seed in group:
                    self.weights(setting, seed)
                    bar.update()
                self._evaluate(group)

    def weights(self, setting: Setting, seed: int) -> dict[str, torch.Tensor]:
        """Return the trained weights; train first if there are none."""
        path = self.folder / "weights" / f"{key_of({'train': setting}, seed)}.pt"
        if self.training(setting, seed) is None or not path.exists():
            start = None if setting.start is None else self.weights(setting.start, seed)
            model, row = self._train(setting, seed, start)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
            self.table.add({"train": setting}, seed, row)
        return torch.load(path, weights_only=True)

    def data(self, recipe: Recipe) -> tuple[data_parts.Data, model_parts.Blueprint]:
        """Return data and model of a recipe; the data is loaded once for all methods, and for all shares of it."""
        whole = whole_data(recipe)
        if whole not in self._data:
            names = {field.name for field in fields(Options)}
            options = Options(**{name: value for name, value in vars(whole).items() if name in names})
            options.robustness_images = self.protocol.images
            blueprint = model_parts.find(options)
            self._data[whole] = data_parts.load(options, blueprint.space, blueprint.size), blueprint
        return self._data[whole]

    def new_model(self, recipe: Recipe, seed: int) -> nn.Module:
        """Return the model that training begins with, the same for each method."""
        data, blueprint = self.data(recipe)
        accelerate.utils.set_seed(seed)
        return blueprint.build(data.classes)

    def _train(
        self, setting: Setting, seed: int, start: dict[str, torch.Tensor] | None
    ) -> tuple[nn.Module, dict[str, float]]:
        recipe, (data, _) = setting.recipe, self.data(setting.recipe)
        model = self.new_model(recipe, seed)
        if start is not None:
            model.load_state_dict(start)
        images = part_of(data.train, recipe.share)
        batch = min(recipe.batch_size, len(images))
        steps = recipe.epochs * (len(data.train) // recipe.batch_size)
        with tempfile.TemporaryDirectory() as scratch:
            config = TrainerConfig(
                batch_size=batch,
                optimizer=recipe.optimizer,
                learning_rate=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                warmup=recipe.warmup,
                max_grad_norm=None,
                channels_last=recipe.channels_last,
                seed=seed,
                save_every=None,
                keep_best=None,
                output_dir=scratch,
                progress=False,
            )
            epochs = max(1, round(steps / (len(images) // batch)))
            phases = phases_of(epochs) if setting.grows else (epochs,)
            options = {"method": setting.method, "pixel_space": data.space}
            wall, cpu = time.perf_counter(), time.process_time()
            fit(model, images, phases=phases, config=config, **options)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            history = results.read_history(Path(scratch))
        if setting.method.auxiliaries:
            entprop.unwrap(model)
        passes = results.Run("", seed, wall, history).passes
        return model.eval(), {"seconds": wall, "cpu_seconds": cpu, "passes": passes}

    def _evaluate(self, group: Sequence[tuple[Setting, int]]) -> None:
        for recipe in dict.fromkeys(whole_data(setting.recipe) for setting, _ in group):
            chosen = [(one, seed) for one, seed in group if whole_data(one.recipe) == recipe]
            data, _ = self.data(recipe)
            models = {}
            for index, (setting, seed) in enumerate(chosen):
                models[str(index)] = self.new_model(recipe, seed)
                models[str(index)].load_state_dict(self.weights(setting, seed))
                models[str(index)].to(accelerate.PartialState().device).eval()
            scores = evaluate_robustness(
                models,
                data.loader(50, 0),  # small batches stay in the cache of a CPU
                pixel_space=data.space,
                severities=self.protocol.severities,
                attacks=attacks(self.protocol.epsilon),
                progress=False,
            )
            for (setting, seed), result in zip(chosen, scores.values(), strict=True):
                self.table.add({"train": setting, "evaluate": self.protocol}, seed, result.to_dict())


def _groups(runs: Sequence[tuple[Setting, int]], size: int) -> Iterable[Sequence[tuple[Setting, int]]]:
    return (runs[start : start + size] for start in range(0, len(runs), size))
