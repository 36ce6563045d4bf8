"""Hugging Face Trainers, and EntProp by hand over the batches that they have seen, with the weights that they give."""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from entprop_wrap import EntProp
from entprop_wrap.integrations.hf_trainer import EntPropCallback
from tests.integrations.by_hand import CLASSES, SPACE, RecordingMixer, pixels, train_by_hand, worst

__all__ = ["CLASSES", "SPACE", "RecordingMixer", "worst"]
METHOD = EntProp(fraction=0.5, mix=None)
OLD = int(transformers.__version__.split(".")[0]) < 5
_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16}
_CONVNEXT = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "drop_path_rate": 0.0}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
CONFIGURATIONS = {
    "ViT": {"patch_size": 8, **_VIT},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "ConvNext": _CONVNEXT,
    "Swin": {**_SWIN, "drop_path_rate": 0.0},
    "Beit": {"patch_size": 8, "drop_path_rate": 0.0, **_VIT},
}
#: Models that hand num_items_in_batch to their loss.
COUNTS_ITEMS = {"ViT"} if OLD else {"ViT", "Swin"}
#: Models that take num_items_in_batch and ignore it, so that nothing divides by the accumulation steps (5.x).
IGNORES_ITEMS = set() if OLD else {"ResNet", "Beit"}


def build(name: str) -> nn.Module:
    """A tiny model, always the same, with logits and norms that are not trivial."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **CONFIGURATIONS[name])
    model = getattr(transformers, f"{name}ForImageClassification")(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def samples(number: int = 22) -> list[dict]:
    """Images in SPACE with labels."""
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(*pixels(number), strict=True)]


def callback(method=METHOD) -> EntPropCallback:
    return EntPropCallback(method, pixel_space=SPACE)


def with_compute_loss(compute) -> type[Trainer]:
    """A Trainer whose ``compute_loss`` is ``compute(trainer, model, inputs) -> loss, outputs``."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = compute(self, model, inputs)
            return (loss, outputs) if return_outputs else loss

    return Own


def averaged(outputs, labels, num_items_in_batch=None):
    """A ``compute_loss_func`` of soft labels and class indices, whatever the accumulation."""
    return F.cross_entropy(outputs.logits, labels)


def counted(outputs, labels, num_items_in_batch=None):
    """One that divides by the images of the step."""
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def keys_in(file) -> set:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def assert_same(found: dict, expected: dict):
    assert set(found) == set(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_plain(folder):
    """A folder holds a model that transformers loads by itself."""
    _, report = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


class RecordGradients(TrainerCallback):
    """Remembers gradients before each optimizer step, after clipping."""

    def __init__(self) -> None:
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class RecordBatches:
    """A collator that remembers its batches."""

    def __init__(self) -> None:
        self.batches = []

    def __call__(self, features):
        self.batches.append(default_data_collator(features))
        return dict(self.batches[-1])


def arguments(folder, **options) -> TrainingArguments:
    """Arguments of a short run on the CPU."""
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


#: What a Trainer takes beside its arguments.
_OWN = ("callbacks", "compute_loss_func", "compute_metrics", "data_collator", "entprop", "eval_dataset", "model_init",
        "optimizers", "processing_class")  # fmt: skip


def make_trainer(folder, trainer_class=Trainer, model="ViT", data=None, **options) -> Trainer:
    """A Trainer of a model, or of a new one by name; options are its own, or those of its arguments."""
    own = {name: options.pop(name) for name in _OWN if name in options}
    if "model_init" not in own:
        own["model"] = build(model) if isinstance(model, str) else model
    data = samples() if data is None else data
    return trainer_class(args=arguments(folder, **options), train_dataset=data, **own)


def train(model, callback, folder, **options):
    """Train, and return the trainer, its batches and its gradients."""
    batches, gradients = RecordBatches(), RecordGradients()
    callbacks = [*([callback] if callback else []), gradients]
    trainer = make_trainer(folder, model=model, data_collator=batches, callbacks=callbacks, **options)
    trainer.train()
    return trainer, batches.batches, gradients.steps


def weight(name, group, batch, loss_kind="model") -> float:
    """By what the Trainer multiplies the mean loss of one batch of an accumulation group, in one process."""
    items = sum(len(b["labels"]) for b in group)
    forwarded = len(batch["labels"]) / items
    if loss_kind == "counted":  # compute_loss_func that divides by num_items_in_batch
        return forwarded
    if loss_kind == "mean":  # compute_loss_func that does not: never divided by the accumulation steps
        return 1.0
    if loss_kind == "smoothed":
        if OLD:
            return 1.0 if name in COUNTS_ITEMS | IGNORES_ITEMS else 1 / len(group)
        return 1 / len(group) if name == "ConvNext" else forwarded
    if name in COUNTS_ITEMS:
        return forwarded
    return 1.0 if name in IGNORES_ITEMS else 1 / len(group)


def processes_factor(name, loss_kind="model") -> float:
    """What the Trainer makes of the mean over two processes, with equal batches."""
    if loss_kind == "smoothed":
        return 2.0 if OLD and name in COUNTS_ITEMS else 1.0
    return 2.0 if loss_kind == "mean" or (loss_kind == "model" and name in IGNORES_ITEMS) else 1.0


def by_hand(name, model, batches, accumulate, *, loss_kind="model", bf16=False, processes=1, **options):
    """Train ``model`` by plain SGD; return gradients of each step, by the names of a wrapped model, and both models.

    With ``processes``, batches are those of one step of the first process, of the same step of the second, and so on.
    """
    factor = processes_factor(name, loss_kind) / processes if processes > 1 else 1.0
    groups = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
    weighted = [
        [(b["pixel_values"], b["labels"], factor * weight(name, group, b, loss_kind)) for b in group]
        for group in groups
    ]
    steps = [list(itertools.chain(*weighted[at : at + processes])) for at in range(0, len(weighted), processes)]
    precision = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16)
    gradients, other = train_by_hand(
        model, steps, lambda net, x: net(pixel_values=x).logits, precision=precision, **options
    )
    return gradients, model, other


def record_states(trainer) -> list[dict]:
    """The state of the model at each checkpoint, in a list that fills while ``trainer`` trains."""
    states, save = [], trainer._save_checkpoint

    def recording(*args, **kwargs):
        states.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        return save(*args, **kwargs)

    trainer._save_checkpoint = recording
    return states


def best_of(scores: list[float]) -> dict:
    """Options of a Trainer whose best model is that of the lowest of ``scores``, one a step."""
    found = iter(scores)
    return {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_dataset": samples(4),
        "load_best_model_at_end": True,
        "metric_for_best_model": "made_up",
        "greater_is_better": False,
        "compute_metrics": lambda prediction: {"made_up": next(found)},
    }
