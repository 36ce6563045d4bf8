"""EntProp by hand, in a plain float32 loop over the batches that a Trainer has seen; nothing of the package's step.

The auxiliary model is a deep copy that shares every parameter except those of the norm layers.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from entprop_wrap import MixUp, PixelSpace

CLASSES = 5
SPACE = PixelSpace((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
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
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(number, 3, 16, 16, generator=generator)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (SPACE.mean, SPACE.std))
    return [{"pixel_values": (x - mean) / std, "labels": i % CLASSES} for i, x in enumerate(pixels)]


class RecordingMixer:
    """MixUp that remembers its draws."""

    def __init__(self) -> None:
        self.draws = []

    def draw(self, shape, generator):
        self.draws.append(MixUp(1.0).draw(shape, generator))
        return self.draws[-1]


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


def train(model, callback, folder, data=None, trainer_class=Trainer, **options):
    """Train, and return the trainer, its batches and its gradients."""
    extra = {name: options.pop(name) for name in ("compute_loss_func", "optimizers") if name in options}
    batches, gradients = RecordBatches(), RecordGradients()
    trainer = trainer_class(
        model=model,
        args=arguments(folder, **options),
        train_dataset=samples() if data is None else data,
        data_collator=batches,
        callbacks=[*([callback] if callback else []), gradients],
        **extra,
    )
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


def shared_copy(model: nn.Module, norms: set[str]) -> nn.Module:
    """A copy of ``model`` with norms of its own and everything else shared."""
    other = copy.deepcopy(model)
    for name, module in model.named_modules():
        if name not in norms:
            twin = other.get_submodule(name)
            twin._parameters = module._parameters
    return other


def by_hand(
    name,
    model,
    batches,
    accumulate,
    *,
    fraction=0.5,
    draws=None,
    clip=0.0,
    smoothing=0.0,
    loss_kind="model",
    bf16=False,
    processes=1,
):
    """Train ``model`` by plain SGD; return gradients of each step, by the names of a wrapped model, and both models.

    With ``processes``, batches are those of one step of the first process, of the same step of the second, and so on.
    """
    norms = {n for n, m in model.named_modules() if "Norm" in type(m).__name__ and any(True for _ in m.parameters())}
    other = shared_copy(model, norms)
    names = {id(p): n for n, p in model.named_parameters()}
    for n in norms:
        for key, parameter in other.get_submodule(n).named_parameters():
            names[id(parameter)] = f"{n}.entprop_aux.{key}"
    parameters = {p: None for net in (model, other) for p in net.parameters()}
    scale = (1 / torch.tensor(SPACE.std)).view(1, 3, 1, 1)
    mean = torch.tensor(SPACE.mean).view(1, 3, 1, 1)
    low, high = (0 - mean) * scale, (1 - mean) * scale
    draws = iter(draws or ())
    steps = []
    model.train()
    other.train()
    for start in range(0, len(batches), accumulate * processes):
        step = batches[start : start + accumulate * processes]
        number_each = len(step) // processes
        for p in parameters:
            p.grad = None
        for index, batch in enumerate(step):
            first = index // number_each * number_each
            group = step[first : first + number_each]
            x, y = batch["pixel_values"], batch["labels"]
            draw = next(draws, None)
            if draw is None:
                partner, share = torch.arange(len(y)), 1.0
            else:
                partner, share = draw.partner, draw.share
            w = weight(name, group, batch, loss_kind)
            if processes > 1:
                w *= processes_factor(name, loss_kind) / processes
            x = (share * x + (1 - share) * x[partner]).requires_grad_()

            def loss_of(logits, rows, y=y, partner=partner, share=share):
                a = F.cross_entropy(logits, y[rows], label_smoothing=smoothing)
                b = F.cross_entropy(logits, y[partner][rows], label_smoothing=smoothing)
                return share * a + (1 - share) * b

            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(pixel_values=x).logits.float()
            (w * loss_of(logits, slice(None))).backward()
            number = max(2, int(fraction * len(y) + 0.5))
            p = logits.detach().softmax(-1)
            rows = (-(p * p.log()).sum(-1)).argsort(descending=True)[:number]
            hard = (x.detach() + scale / 255 * x.grad.sign())[rows].clamp(low, high)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = other(pixel_values=hard).logits.float()
            (w * number / len(y) * loss_of(logits, rows)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(list(parameters), clip)
        steps.append({names[id(p)]: p.grad.clone() for p in parameters if p.grad is not None})
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p -= 0.01 * p.grad
    return steps, model, other


def worst(found: list[dict], expected: list[dict]) -> float:
    """The largest relative difference of the gradients of any step."""
    assert [set(step) for step in found] == [set(step) for step in expected]
    result = 0.0
    for a, b in zip(found, expected, strict=True):
        size = torch.cat([v.flatten() for v in b.values()]).norm()
        result = max(result, *(float((a[n] - b[n]).norm() / (b[n].norm() + 1e-3 * size)) for n in b))
    return result
