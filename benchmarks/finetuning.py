"""Does a method pay in a fine-tuning? Through the Hugging Face Trainer, at several budgets, paired over seeds.

    python benchmarks/finetuning.py --dataset path/to/pets --model path/to/mobilenet_v1_0.75_224 --image-size 96 \
        --epochs 4 12 20 --seeds 0 1 2 3 4

Every method starts from the same weights, with the same head, and sees the same data in the same order. SA is the
accuracy on all test images; RA the mean accuracy over 15 corruptions x 5 severities of ``--robustness-images`` of them;
Hscore their harmonic mean. The tables give each method's mean over seeds and the 95 % t-interval of its difference to
the first method, paired by seed. Finished runs are lines in ``runs.jsonl``: a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import transformers
from comparison import between_markers
from run_table import RunTable
from torch.utils.data import DataLoader, Subset

import entprop_wrap as entprop
from entprop_wrap import EntProp, MixUp, PixelSpace
from entprop_wrap.integrations.hf_trainer import EntPropCallback
from entprop_wrap.integrations.hub_datasets import eval_transform, in_memory, load_images, train_transform
from entprop_wrap.methods import Vanilla
from entprop_wrap.robustness import Estimate, evaluate_robustness
from entprop_wrap.robustness.scores import hscore
from entprop_wrap.train.models import repair_keep_probabilities

METHODS = {
    "vanilla": Vanilla(),
    "EntProp.finetuning()": EntProp.finetuning(),
    "EntProp()": EntProp(),
    **{
        f"k = {k}, Beta({alpha})": EntProp.finetuning(fraction=k, mix=MixUp(alpha))
        for alpha in (0.1, 0.2, 1.0)
        for k in (0.2, 0.3, 0.6, 1.0)
    },
    "k = 0.6, Beta(1.0), epsilon 4/255": EntProp.finetuning(fraction=0.6, mix=MixUp(1.0), epsilon=4 / 255),
    "k = 0.2, no mixing": EntProp.finetuning(fraction=0.2, mix=None),
    "k = 0.2, no mixing, epsilon 4/255": EntProp.finetuning(fraction=0.2, mix=None, epsilon=4 / 255),
    "k = 0.6, no mixing, epsilon 4/255": EntProp.finetuning(fraction=0.6, mix=None, epsilon=4 / 255),
}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    table = RunTable(options.output / "runs.jsonl")
    task = Task(options)
    for epochs in [] if options.report else options.epochs:
        for seed in options.seeds:
            run(task, {name: METHODS[name] for name in options.methods}, epochs, seed, table, options)
    text = "\n\n".join(tables(task, epochs, table, options) for epochs in options.epochs)
    print(text)
    if options.write:
        between_markers(options.write, "finetuning", text)


class Task:
    """Data and model, and what is needed to train and to test."""

    def __init__(self, options) -> None:
        self.processor = transformers.AutoImageProcessor.from_pretrained(options.model)
        self.model, self.space = options.model, PixelSpace.from_processor(self.processor)
        train = train_transform(options.image_size, normalize=self.space)
        test = eval_transform(options.image_size, normalize=self.space)
        data = load_images(options.dataset, train_transform=train, eval_transform=test)
        stored = round(options.image_size * 8 / 7)  # so that random crops have something to choose from
        self.classes = data.classes
        self.train, self.test = in_memory(data.train, stored, train), in_memory(data.eval, stored, test)
        chosen = torch.randperm(len(self.test), generator=torch.Generator().manual_seed(0))
        self.clean = DataLoader(self.test, batch_size=64)
        self.robustness = DataLoader(Subset(self.test, chosen[: options.robustness_images].tolist()), batch_size=64)

    def build(self) -> torch.nn.Module:
        """Return the pretrained model with a new head."""
        model = transformers.AutoModelForImageClassification.from_pretrained(
            self.model,
            ignore_mismatched_sizes=True,
            id2label=dict(enumerate(self.classes)),
            label2id={name: index for index, name in enumerate(self.classes)},
        )
        repair_keep_probabilities(model)
        return model.to(memory_format=torch.channels_last)


def run(task, methods, epochs, seed, table, options) -> None:
    """Train and test what is missing of one budget and seed; models are tested together."""
    missing = {
        name: method for name, method in methods.items() if row(task, method, epochs, seed, table, options) is None
    }
    trained, seconds = {}, {}
    for name, method in missing.items():
        transformers.set_seed(seed)
        model = task.build()
        begin = time.process_time()
        fine_tune(task, model, method, epochs, seed, options)
        seconds[name] = time.process_time() - begin
        trained[name] = entprop.unwrap(model).eval() if method.auxiliaries else model.eval()
        print(f"{name}, {epochs} epochs, seed {seed}: {seconds[name]:.0f} s", flush=True)
    if not trained:
        return
    results = evaluate_robustness(trained, task.robustness, pixel_space=task.space, progress=options.progress)
    for name, model in trained.items():
        scores = {"sa": accuracy(model, task.clean), "ra": results[name].ra, "cpu_seconds": seconds[name]}
        table.add(settings(task, missing[name], epochs, options), seed, scores)
        print(f"{name}, {epochs} epochs, seed {seed}: {scores}", flush=True)


def fine_tune(task, model, method, epochs, seed, options) -> None:
    """Train with the Trainer; plain training does without the callback."""
    steps = epochs * (len(task.train) // options.batch_size)
    arguments = transformers.TrainingArguments(
        output_dir=str(options.output / "trainer"),
        num_train_epochs=epochs,
        per_device_train_batch_size=options.batch_size,
        dataloader_drop_last=True,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.01,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=not options.progress,
    )
    transformers.Trainer(
        model,
        arguments,
        train_dataset=task.train,
        data_collator=collate,
        processing_class=task.processor,
        callbacks=[] if isinstance(method, Vanilla) else [EntPropCallback(method)],
    ).train()


def collate(samples) -> dict[str, torch.Tensor]:
    images = torch.stack([image for image, _ in samples]).contiguous(memory_format=torch.channels_last)
    return {"pixel_values": images, "labels": torch.tensor([label for _, label in samples])}


@torch.no_grad()
def accuracy(model, loader) -> float:
    right = [model(images.contiguous(memory_format=torch.channels_last)).logits.argmax(1) == y for images, y in loader]
    return torch.cat(right).double().mean().item()


def settings(task, method, epochs, options) -> dict:
    """Return what a run depends on, beside its seed."""
    return {
        "data": [len(task.train), len(task.test), len(task.classes)],
        "model": Path(task.model).name,
        "image_size": options.image_size,
        "method": method,
        "epochs": epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "robustness_images": options.robustness_images,
    }


def row(task, method, epochs, seed, table, options) -> dict | None:
    return table.find(settings(task, method, epochs, options), seed)


def tables(task, epochs, table, options) -> str:
    """Return one budget's table in Markdown."""
    first = METHODS[options.methods[0]]
    lines = [
        f"**{epochs} epochs** ({epochs * (len(task.train) // options.batch_size)} steps)",
        "",
        "| method | seeds | SA | RA | Hscore | SA, difference | RA, difference | Hscore, difference | time |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in options.methods:
        pairs = [
            (found, base)
            for seed in options.seeds
            if (found := row(task, METHODS[name], epochs, seed, table, options)) is not None
            and (base := row(task, first, epochs, seed, table, options)) is not None
        ]
        if not pairs:
            continue
        own, base = ([scores(pair[side]) for pair in pairs] for side in (0, 1))
        means = [f"{statistics.fmean(values):.1f}" for values in zip(*own, strict=True)]
        changes = [
            Estimate.of([a - b for a, b in zip(mine, theirs, strict=True)])
            for mine, theirs in zip(zip(*own, strict=True), zip(*base, strict=True), strict=True)
        ]
        shown = ["", "", ""] if name == options.methods[0] else [interval(change) for change in changes]
        time_ = statistics.median(found["cpu_seconds"] / reference["cpu_seconds"] for found, reference in pairs)
        lines.append(f"| {name} | {len(pairs)} | {' | '.join(means)} | {' | '.join(shown)} | {time_:.2f} |")
    return "\n".join(lines)


def scores(found) -> tuple[float, float, float]:
    return 100 * found["sa"], 100 * found["ra"], 100 * hscore(found["sa"], found["ra"])


def interval(change: Estimate) -> str:
    if change.half_width is None:
        return f"{change.mean:+.1f}"
    low, high = change.mean - change.half_width, change.mean + change.half_width
    return f"{change.mean:+.1f} ({low:+.1f} to {high:+.1f})"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a folder of images or parquet files, or a Hub id")
    parser.add_argument("--model", required=True, help="a Hub id, or a local folder")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["vanilla", "EntProp.finetuning()"])
    parser.add_argument("--epochs", type=int, nargs="+", default=[4, 12, 20])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--robustness-images", type=int, default=335)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    parser.add_argument("--output", type=Path, default=Path("outputs/finetuning"))
    parser.add_argument("--report", action="store_true", help="tables from what is done; nothing is trained")
    parser.add_argument("--write", type=Path, help="a page whose <!-- finetuning --> part gets the tables")
    return parser.parse_args()


if __name__ == "__main__":
    main()
