"""Train an image classifier with EntProp and without, from the same seed, and compare accuracy and robustness.

    accelerate launch examples/train.py
    accelerate launch examples/train.py --dataset path/to/images --model resnet50 --pretrained
    accelerate launch examples/train.py --methods vanilla entprop advprop fast_advprop --equal-cost
    accelerate launch examples/train.py --dataset timm/oxford-iiit-pet --model microsoft/resnet-50 --pretrained
    accelerate launch examples/train.py --augment trivialaugment
    accelerate launch examples/train.py --methods entprop advprop --set uncertainty=margin targeted=true --attack 8/255
    accelerate launch examples/train.py --methods entropic_retraining --weights outputs/train/vanilla-seed0/model

The first trains on scikit-learn's digits, in a minute or two on a CPU. Every method is trained once per seed, on the
same data in the same order. The table at the end gives clean accuracy (SA), mean accuracy under corruptions (RA), their
harmonic mean (Hscore), accuracy under PGD-20 with --attack, the seconds that training took, and passes per step, where
one pass is forward and backward of one batch. The output folder then holds results.json, report.html, curves.png, and
one folder per run with its checkpoints, its metrics.jsonl and the final model, which loads without entprop_wrap, and
which --weights goes on with: entropic_retraining needs that, few epochs, and a small learning rate.
"""

from __future__ import annotations

import time

import accelerate
from parts import data as data_parts
from parts import methods as method_parts
from parts import models as model_parts
from parts import report
from parts.command_line import parse
from parts.settings import attacks

import entprop_wrap as entprop
from entprop_wrap import Trainer, TrainerConfig
from entprop_wrap.data.augmentation import AugmentedImages
from entprop_wrap.diagnostics import Monitor
from entprop_wrap.errors import EntPropError
from entprop_wrap.robustness import evaluate_robustness

#: What to write here, by the words of messages that are for Python.
HINTS = {
    ("resume=True",): "--resume goes on",
    ("output_dir",): "--output starts elsewhere",
    ("batch_size", "batch size", "drop_last"): "--batch-size sets the batch",
    ("more epochs",): "--epochs sets how long",
}


def main() -> None:
    options = parse(__doc__)
    attacked = attacks(options.attack)
    methods = method_parts.build(options)
    blueprint = model_parts.find(options)
    data = data_parts.load(options, blueprint.space, blueprint.size)
    if options.augment != "none":
        data.train = AugmentedImages(data.train, options.augment, data.space)

    def build():
        return model_parts.start_from(blueprint.build(data.classes), options.weights)

    # Weights that do not fit, and a model without norm layers, are to fail before anything is trained.
    model = build()
    if any(method.auxiliaries for method in methods.values()):
        entprop.wrap(model)
    for name, method in methods.items():
        if growth := method_parts.growth(name, options):  # and so is one that does not fit into the epochs
            growth.plan(lambda phases: 1, method_parts.epochs(method, options), 1)
    runs: list[report.Run] = []
    for seed in range(options.seed, options.seed + options.seeds):
        trained = {}
        for name, method in methods.items():
            accelerate.utils.set_seed(seed)
            run, trained[name] = train(name, method, build(), data, seed, options)
            runs.append(run)
        scores = evaluate_robustness(
            trained,
            data.loader(data.robustness, options.eval_batch_size, options.workers),
            pixel_space=data.space,
            severities=tuple(options.severities),
            attacks=attacked,
        )
        for run in runs[-len(trained) :]:
            run.scores = scores[run.method]
    if accelerate.PartialState().is_main_process:
        print("\n" + report.table(runs, data))
        report.save(runs, data, options)


def train(name, method, model, data, seed, options):
    """Train one model; return the record of the run, and the plain model in evaluation mode."""
    monitor = Monitor() if options.monitor else None
    trainer = Trainer(
        model,
        data.train,
        data.eval,
        method=method,
        pixel_space=data.space,
        monitor=monitor,
        growth=method_parts.growth(name, options),
        config=TrainerConfig(
            epochs=method_parts.epochs(method, options),
            batch_size=options.batch_size,
            eval_batch_size=options.eval_batch_size,
            optimizer=options.optimizer,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            schedule=options.schedule,
            warmup=options.warmup,
            mixed_precision=options.mixed_precision,
            max_grad_norm=options.max_grad_norm,
            channels_last=options.channels_last,
            evaluate_every=max(1, options.epochs // 10),
            seed=seed,
            workers=options.workers,
            output_dir=options.output / f"{name}-seed{seed}",
        ),
    )
    start = time.perf_counter()
    trainer.fit(resume=options.resume)
    seconds = time.perf_counter() - start
    found = {}
    if method.auxiliaries:
        if seed == options.seed and accelerate.PartialState().num_processes == 1:
            found = report.diagnose(name, method, trainer.model.eval(), data, options)
        entprop.unwrap(trainer.model)
    history = report.read_history(options.output / f"{name}-seed{seed}" / "metrics.jsonl")
    run = report.Run(name, seed, seconds, history, diagnostics=found, warnings=monitor.warnings if monitor else {})
    return run, trainer.model.eval()


def hint(message: str) -> str:
    """Return what a message that speaks of Python arguments means on this command line."""
    found = [option for words, option in HINTS.items() if any(word in message for word in words)]
    return f"\nOn this command line: {', '.join(found)}." if found else ""


if __name__ == "__main__":
    try:
        main()
    except EntPropError as error:
        raise SystemExit(f"{type(error).__name__}: {error}{hint(str(error))}") from error
