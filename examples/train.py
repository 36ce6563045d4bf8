"""Train an image classifier with EntProp and without, from the same seed, and compare accuracy and robustness.

    accelerate launch examples/train.py
    accelerate launch examples/train.py --dataset path/to/images --model resnet50 --pretrained
    accelerate launch examples/train.py --methods vanilla entprop advprop fast_advprop --equal-cost
    accelerate launch examples/train.py --dataset timm/oxford-iiit-pet --model microsoft/resnet-50 --pretrained

The first trains on scikit-learn's digits, in a minute or two on a CPU. Every method is trained once per seed, on the
same data in the same order. The table at the end gives clean accuracy (SA), mean accuracy under corruptions (RA), their
harmonic mean (Hscore), the seconds that training took, and passes per step, where one pass is forward and backward of
one batch. The output folder then holds results.json, report.html, curves.png, and one folder per run with its
checkpoints, its metrics.jsonl and the final model, which loads without entprop_wrap.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import accelerate
from parts import data as data_parts
from parts import methods as method_parts
from parts import models as model_parts
from parts import report

import entprop_wrap as entprop
from entprop_wrap import Trainer, TrainerConfig
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
    options = parse()
    methods = method_parts.build(options)
    blueprint = model_parts.find(options)
    data = data_parts.load(options, blueprint.space, blueprint.size)
    if any(method.auxiliaries for method in methods.values()):
        # A model without norm layers is to fail before anything is trained.
        entprop.wrap(blueprint.build(data.classes))
    for name, method in methods.items():
        if growth := method_parts.growth(name, options):  # and so is one that does not fit into the epochs
            growth.plan(lambda phases: 1, method_parts.epochs(method, options), 1)
    runs: list[report.Run] = []
    for seed in range(options.seed, options.seed + options.seeds):
        trained = {}
        for name, method in methods.items():
            accelerate.utils.set_seed(seed)
            run, trained[name] = train(name, method, blueprint.build(data.classes), data, seed, options)
            runs.append(run)
        scores = evaluate_robustness(
            trained,
            data.loader(data.robustness, options.eval_batch_size, options.workers),
            pixel_space=data.space,
            severities=tuple(options.severities),
        )
        for run in runs[-len(trained) :]:
            run.scores = scores[run.method]
    if accelerate.PartialState().is_main_process:
        print("\n" + report.table(runs, data))
        report.save(runs, data, options)


def train(name, method, model, data, seed, options):
    """Train one model; return the record of the run, and the plain model in evaluation mode."""
    trainer = Trainer(
        model,
        data.train,
        data.eval,
        method=method,
        pixel_space=data.space,
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
    return report.Run(name, seed, seconds, history, diagnostics=found), trainer.model.eval()


def parse() -> argparse.Namespace:
    """Read the command line. Some defaults depend on the data: digits are trained from scratch, the rest fine-tuned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default=data_parts.DIGITS,
        help="digits; a folder of class folders or of parquet files; or a Hub id (default: digits)",
    )
    group.add_argument("--train-split", help="split to train on (default: train)")
    group.add_argument(
        "--eval-split", help="split to test on (default: validation, else test, else a seeded part of train)"
    )
    group.add_argument("--max-train", type=int, help="train on so many images, stratified (digits: 300)")
    group.add_argument("--max-eval", type=int, help="test on so many images, stratified")
    group.add_argument("--in-memory", action="store_true", help="decode the images once and keep them in memory")
    group.add_argument("--workers", type=int, default=0, help="data loader processes (default: 0)")

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", help="small_cnn, a torchvision or timm name, a Hub id or a local folder (default: small_cnn)"
    )
    group.add_argument("--pretrained", action="store_true", help="start from pretrained weights")
    group.add_argument("--image-size", type=int, help="pixels (default: what the model was made for)")

    method_parts.add_options(parser)

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, help="(default: 10; digits: 60)")
    group.add_argument("--batch-size", type=int, default=64, help="images per process and step (default: 64)")
    group.add_argument("--eval-batch-size", type=int, default=256, help="(default: 256)")
    group.add_argument("--optimizer", choices=["adamw", "adam", "sgd"], help="(default: adamw; digits: sgd)")
    group.add_argument("--learning-rate", type=float, help="(default: 3e-4; digits: 0.1)")
    group.add_argument(
        "--weight-decay", type=float, help="not applied to norms and biases (default: 0.01; digits: 5e-4)"
    )
    group.add_argument(
        "--schedule", choices=["cosine", "linear", "step", "constant"], default="cosine", help="(default: cosine)"
    )
    group.add_argument("--warmup", type=float, default=0.1, help="share of the steps to warm up for (default: 0.1)")
    group.add_argument("--max-grad-norm", type=float, help="clip gradients to this norm (default: off)")
    group.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], help="(default: accelerate's)")
    group.add_argument("--channels-last", action="store_true", help="faster convolutions on most hardware")

    group = parser.add_argument_group("runs and results")
    group.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
    group.add_argument("--seeds", type=int, default=1, help="number of seeds (default: 1)")
    group.add_argument(
        "--severities", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the corruptions (default: 1 2 3 4 5)"
    )
    group.add_argument(
        "--robustness-images", type=int, help="measure SA and RA on so many test images (digits: 500; default: all)"
    )
    group.add_argument(
        "--output", type=Path, default=Path("outputs/train"), help="folder for everything (default: outputs/train)"
    )
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoints in the output folder")

    options = parser.parse_args()
    options.given = method_parts.explicit(parser)
    if options.equal_cost and "fast_advprop" not in options.methods:
        parser.error("--equal-cost is for fast_advprop: name it in --methods, or leave --equal-cost out")
    digits = options.dataset == data_parts.DIGITS
    defaults = {
        "model": model_parts.SMALL,
        "epochs": 60 if digits else 10,
        "optimizer": "sgd" if digits else "adamw",
        "learning_rate": 0.1 if digits else 3e-4,
        "weight_decay": 5e-4 if digits else 0.01,
        "epsilon": 0.1 if digits else None,
        "robustness_images": 500 if digits else None,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def hint(message: str) -> str:
    """Return what a message that speaks of Python arguments means on this command line."""
    found = [option for words, option in HINTS.items() if any(word in message for word in words)]
    return f"\nOn this command line: {', '.join(found)}." if found else ""


if __name__ == "__main__":
    try:
        main()
    except EntPropError as error:
        raise SystemExit(f"{type(error).__name__}: {error}{hint(str(error))}") from error
