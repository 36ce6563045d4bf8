"""The scripts that people already run, with the diffs of docs/clients: do they train, and what do they write?

    git clone https://github.com/pytorch/vision
    python benchmarks/clients.py torchvision vision
    python benchmarks/clients.py timm pytorch-image-models --images folder   # with train/ and val/, a folder per class

Copies what is needed of a checkout, applies the diff that stands on the client's page, trains an epoch on a small
folder of images on the CPU and prints a row of a Markdown table. Fails unless every batch gave one finite loss and one
optimizer step, the copies in the checkpoint moved, and the client's own script, unpatched, evaluates the checkpoint
once ``python -m entprop_wrap strip`` has made it plain. Needs patch, and what the scripts import (DeiT: timm 0.4.12;
Swin: yacs and termcolor).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

PAGES = Path(__file__).parent.parent / "docs" / "clients"
BATCH, BATCHES, CLASSES = 16, 4, 8  # the scripts count the best five

# Runs first in each Python process of a client, as its sitecustomize.py: notes losses and optimizer steps in a file.
RECORDER = """
import argparse
import os
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from entprop_wrap.methods.base import Step

def note(line):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"{line}\\n")

made = Step.output
def output(self, **parts):
    note(float(parts.get("loss", None) if parts.get("loss") is not None else parts["main_loss"]))
    return made(self, **parts)
Step.output = output
register_optimizer_step_post_hook(lambda *ignored: note("step"))
torch.serialization.add_safe_globals([argparse.Namespace])  # torchvision saves its options, and loads weights only
"""

# For scripts written for one GPU at least.
WITHOUT_CUDA = """
import torch.distributed
torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **options: self
torch.cuda.set_device = lambda *args: None
torch.cuda.synchronize = lambda *args: None
torch.cuda.amp.GradScaler = lambda: torch.amp.GradScaler("cpu")
start, ddp = torch.distributed.init_process_group, torch.nn.parallel.DistributedDataParallel.__init__
torch.distributed.init_process_group = lambda **options: start(**{**options, "backend": "gloo"})
torch.nn.parallel.DistributedDataParallel.__init__ = (
    lambda self, module, device_ids=None, **options: ddp(self, module, **options)
)
"""

# evaluate.load("accuracy") looks beside the script before it asks the Hub.
ACCURACY = """
import datasets
import evaluate
import numpy as np

class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": float(np.equal(predictions, references).mean())}
"""


@dataclass(frozen=True)
class Client:
    """A script: its page and which diff of it, what to copy, how to train, and how to evaluate what was stripped.

    ``{images}``, ``{out}``, ``{model}`` (a tiny Hugging Face model), ``{config}`` (the page's YAML) and ``{plain}``
    stand for paths. ``checkpoint`` is below ``{out}``; a folder is one of ``save_pretrained``, which is plain already.
    """

    page: str
    files: str
    train: str
    test: str
    checkpoint: str
    versions: tuple[str, ...]
    diff: int = 0
    strip: str = "strip"
    folder: str = "."
    without_cuda: bool = False


_TIMM = "--num-classes 8 --img-size 32 --device cpu"
_VISION = "--data-path {images} --device cpu -b 16 -j 0 --train-crop-size 32 --val-resize-size 32 --val-crop-size 32"
_DEIT = (
    "--data-path {images} --device cpu --batch-size 16 --num_workers 0 --input-size 32 --model deit_tiny_patch16_224"
)
_SWIN = (
    "--cfg configs/swin/swin_tiny_patch4_window7_224.yaml --data-path {images} --output {out} --tag run --opts "
    "DATA.IMG_SIZE 32 DATA.BATCH_SIZE 16 DATA.NUM_WORKERS 0 MODEL.SWIN.WINDOW_SIZE 4 MODEL.SWIN.EMBED_DIM 24 "
    "MODEL.SWIN.DEPTHS [1,1] MODEL.SWIN.NUM_HEADS [2,2] TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 AMP_ENABLE False "
    "TRAIN.LR_SCHEDULER.NAME step"
)
_LABEL = "--label_column_name label"
_FOLDERS = "--train_dir {images}/train --validation_dir {images}/val " + _LABEL
_HF = "--remove_unused_columns False --use_cpu --report_to none " + _FOLDERS
_LIGHTNING = "--model.data_path {images} --model.batch_size 16 --model.workers 0 --trainer.accelerator cpu"

CLIENTS = {
    "timm": Client(
        "timm",
        "train.py validate.py timm",
        "train.py --data-dir {images} --val-split val --model resnet18 --opt sgd --epochs 1 --batch-size 16 -j 1 "
        "--model-ema --reprob 0.25 --remode pixel --output {out} --experiment run " + _TIMM,
        "validate.py --data-dir {images} --split val --model resnet18 --checkpoint {plain} --workers 1 " + _TIMM,
        "run/last.pth.tar",
        ("torch",),
    ),
    "torchvision": Client(
        "torchvision",
        "references/classification",
        "train.py --model resnet18 --epochs 1 --norm-weight-decay 0 --model-ema --random-erase 0.1 --output-dir {out} "
        + _VISION,
        "train.py --model resnet18 --test-only --resume {plain} " + _VISION,
        "checkpoint.pth",
        ("torch", "torchvision"),
        folder="references/classification",
    ),
    "deit": Client(
        "deit",
        ".",
        "main.py --epochs 1 --mixup 0 --cutmix 0 --aa rand-m9 --output_dir {out} " + _DEIT,
        "main.py --eval --resume {plain} " + _DEIT,
        "checkpoint.pth",
        ("torch", "timm"),
        without_cuda=True,
    ),
    "swin": Client(
        "deit",
        ".",
        "main.py " + _SWIN,
        "main.py --eval --resume {plain} " + _SWIN,
        "swin_tiny_patch4_window7_224/run/ckpt_epoch_0.pth",
        ("torch", "timm"),
        diff=1,
        strip="strip --trust",  # its configuration is an object of yacs
        without_cuda=True,
    ),
    "huggingface": Client(
        "huggingface_scripts",
        "examples/pytorch/image-classification",
        "run_image_classification.py --model_name_or_path {model} --do_train --do_eval --num_train_epochs 1 "
        "--per_device_train_batch_size 16 --save_strategy epoch --output_dir {out} " + _HF,
        "run_image_classification.py --model_name_or_path {plain} --do_eval --output_dir {out}/evaluated " + _HF,
        "checkpoint-4",
        ("torch", "transformers"),
        folder="examples/pytorch/image-classification",
    ),
    "huggingface_no_trainer": Client(
        "huggingface_scripts",
        "examples/pytorch/image-classification",
        "run_image_classification_no_trainer.py --model_name_or_path {model} --num_train_epochs 1 --output_dir {out} "
        "--per_device_train_batch_size 16 --checkpointing_steps epoch --dataset_name {images} " + _LABEL,
        "run_image_classification.py --model_name_or_path {plain} --do_eval --output_dir {out}/evaluated " + _HF,
        "epoch_0",
        ("torch", "transformers", "accelerate"),
        diff=1,
        folder="examples/pytorch/image-classification",
    ),
    "lightning": Client(
        "lightning",
        "examples/pytorch/domain_templates/imagenet.py",
        "imagenet.py fit --config {config} --trainer.max_epochs 1 --trainer.default_root_dir {out} " + _LIGHTNING,
        "imagenet.py test --ckpt_path {plain} " + _LIGHTNING,
        "checkpoints/epoch=0-step=4.ckpt",
        ("torch", "lightning"),
        folder="examples/pytorch/domain_templates",
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("checkout", type=Path, help="folder with the client's repository")
    parser.add_argument("--images", type=Path, help="folder with train/ and val/; else scikit-learn's digits")
    parser.add_argument("--keep", type=Path, help="new folder to work in, which stays")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = options.keep or Path(name)
        work.mkdir(exist_ok=True)
        print(row(options.client, options.checkout, options.images, work.resolve()))


def row(name: str, checkout: Path, images: Path | None, work: Path) -> str:
    """Run a client, check what it wrote, and return its row: client, versions, lines, outcome."""
    client = CLIENTS[name]
    original, patched, out = (work / part for part in ("original", "patched", "out"))
    for copy in (original, patched):
        copy.mkdir()
        subprocess.run(["cp", "-r", "--parents", *client.files.split(), copy], cwd=checkout, check=True)
    diff = "" if name == "lightning" else blocks(client.page, "diff")[client.diff]  # its page has YAML instead
    apply(diff, patched)
    paths = {
        "images": images.resolve() if images else digits(work / "images"),
        "out": out,
        "plain": work / "plain.pth",
        "config": work / "entprop.yaml",
        "model": work / "model",
    }
    if name.startswith("huggingface"):
        tiny_model(paths["model"])
        for copy in (original, patched):
            (copy / client.folder / "accuracy").mkdir()
            (copy / client.folder / "accuracy" / "accuracy.py").write_text(ACCURACY)
    paths["config"].write_text("\n".join(blocks(client.page, "yaml")[:1]))
    (work / "sitecustomize.py").write_text(RECORDER + (WITHOUT_CUDA if client.without_cuda else ""))

    run(client.train, patched / client.folder, work, paths)
    notes = (work / "notes").read_text().split()
    losses, steps = [float(note) for note in notes if note != "step"], notes.count("step")
    assert math.isfinite(sum(losses) / len(losses)), losses
    assert steps == len(losses), f"{steps} optimizer steps in {len(losses)} batches"
    checkpoint = out / client.checkpoint
    moved, total = copies_moved(checkpoint)
    assert moved, f"none of {total} copies moved"
    if checkpoint.is_dir():  # of Hugging Face, which writes a plain model at the end
        paths["plain"] = out
    elif name == "lightning":  # whose checkpoints are plain
        paths["plain"] = checkpoint
    else:
        make_plain(checkpoint, paths["plain"], client.strip)
    run(client.test, original / client.folder, work, paths)
    assert (work / "notes").read_text().split() == notes, "the evaluation trained"

    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in client.versions)
    outcome = f"{steps} steps in {len(losses)} batches, {moved} of {total} copies moved, plain file evaluated"
    return f"| {name} | {versions} | {count_lines(diff)} | {outcome} |"


def blocks(page: str, language: str) -> list[str]:
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def apply(diff: str, folder: Path) -> None:
    command = ["patch", "--strip=1", "--ignore-whitespace", "--fuzz=0"]
    subprocess.run(command, cwd=folder, input=diff, text=True, check=True, stdout=subprocess.DEVNULL)


def count_lines(diff: str) -> str:
    changed = [line[0] for line in diff.splitlines() if re.match(r"[+-](?!\+\+ |-- )", line)]
    return f"+{changed.count('+')} -{changed.count('-')}"


def digits(folder: Path) -> Path:
    """Write eight of scikit-learn's digits as PNG files, 32 pixels wide, a folder per class, and return the folder."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    for part, first, number in (("train", 0, BATCH * BATCHES), ("val", BATCH * BATCHES, 2 * BATCH)):
        for index in range(first, first + number):
            label = index % CLASSES
            image = pixels[labels == label][index].reshape(8, 8) * 15.9
            target = folder / part / f"digit_{label}" / f"{index}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).convert("RGB").resize((32, 32)).save(target)
    return folder


def tiny_model(folder: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES)
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def run(command: str, folder: Path, work: Path, paths: dict[str, Path]) -> None:
    """Run a script; raise with the end of what it printed unless it succeeds."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(work), os.environ.get("PYTHONPATH", "")]),
        "NOTES": str(work / "notes"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "cache"),
        "ACCELERATE_USE_CPU": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",  # checkpoints of scripts hold their options; this one is ours
        **({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} if "swin" in command else {}),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    arguments = [argument.format(**paths) for argument in command.split()]
    log = work / f"{arguments[0]}.log"
    with log.open("a") as file:
        ended = subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    if ended.returncode:
        sys.exit(f"{log.read_text()[-6000:]}\n{command}")


def copies_moved(checkpoint: Path) -> tuple[int, int]:
    """Return how many tensors of copies in a checkpoint differ from what they are copies of, and how many there are."""
    if checkpoint.is_dir():
        state = {key: tensor for file in checkpoint.glob("*.safetensors") for key, tensor in load_file(file).items()}
    else:
        loaded = torch.load(checkpoint, map_location="cpu", weights_only=False)
        state = loaded.get("model", loaded.get("state_dict")) | loaded.get("entprop_auxiliary", {})
    pairs = [(tensor, state[key.replace("entprop_aux.", "")]) for key, tensor in state.items() if "entprop_aux." in key]
    return sum(not torch.equal(copy, own) for copy, own in pairs), len(pairs)


def make_plain(checkpoint: Path, plain: Path, strip: str) -> None:
    command = [sys.executable, "-m", "entprop_wrap", *strip.split(), str(checkpoint), str(plain)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    stripped = torch.load(plain, map_location="cpu", weights_only=False)
    assert "entprop" not in str([list(part) for part in stripped.values() if isinstance(part, dict)])


if __name__ == "__main__":
    main()
