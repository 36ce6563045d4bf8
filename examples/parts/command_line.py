"""The command line of train.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from entprop_wrap.data.augmentation import AUGMENTATIONS

from . import data, methods, models


def parse(description: str) -> argparse.Namespace:
    """Read the command line. Some defaults depend on the data: digits are trained from scratch, the rest fine-tuned."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default=data.DIGITS,
        help="digits; a folder of class folders or of parquet files; or a Hub id (default: digits)",
    )
    group.add_argument("--train-split", help="split to train on (default: train)")
    group.add_argument(
        "--eval-split", help="split to test on (default: validation, else test, else a seeded part of train)"
    )
    group.add_argument("--max-train", type=int, help="train on so many images, stratified (digits: 300)")
    group.add_argument("--max-eval", type=int, help="test on so many images, stratified")
    group.add_argument("--in-memory", action="store_true", help="decode the images once and keep them in memory")
    group.add_argument("--augment", choices=AUGMENTATIONS, default="none", help="of training images (default: none)")
    group.add_argument("--workers", type=int, default=0, help="data loader processes (default: 0)")

    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", help="small_cnn, a torchvision or timm name, a Hub id or a local folder (default: small_cnn)"
    )
    group.add_argument("--pretrained", action="store_true", help="start from pretrained weights")
    group.add_argument(
        "--weights",
        type=Path,
        help="begin, in each run, with trained weights: a safetensors file, or a folder that train.py wrote",
    )
    group.add_argument("--image-size", type=int, help="pixels (default: what the model was made for)")

    methods.add_options(parser)

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
        "--attack",
        type=methods.fraction,
        metavar="EPSILON",
        help="also measure accuracy under PGD-20 with the model's own gradients, such as 8/255 (default: no attack)",
    )
    group.add_argument(
        "--monitor", action="store_true", help="warn of training that fails quietly (entprop_wrap.diagnostics.Monitor)"
    )
    group.add_argument(
        "--output", type=Path, default=Path("outputs/train"), help="folder for everything (default: outputs/train)"
    )
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoints in the output folder")

    options = parser.parse_args()
    options.given = methods.explicit(parser)
    if options.equal_cost and "fast_advprop" not in options.methods:
        parser.error("--equal-cost is for fast_advprop: name it in --methods, or leave --equal-cost out")
    if options.weights is None and (found := [name for name in methods.TRAINED if name in options.methods]):
        parser.error(
            f"{found[0]} goes on with a trained model: train one, and name its weights, such as --weights "
            "outputs/train/vanilla-seed0/model"
        )
    digits = options.dataset == data.DIGITS
    defaults = {
        "model": models.SMALL,
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
