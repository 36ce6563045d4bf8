"""What methods.py compares: every method, and the shapes of the paper's tables 7, 8, 16 and 17.

An entry is a dict with "method"; "grows" where the data does; or "start", the name of the entry whose weights it begins
with, and "recipe": for how many epochs it continues, and at what share of the learning rate. The first entry of a table
is what the others are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from entprop_wrap import EntProp
from entprop_wrap.functional import uncertainty
from entprop_wrap.methods import MEADA, Method, Vanilla
from entprop_wrap.methods.entropic_retraining import EntropicRetraining
from entprop_wrap.train import methods as method_parts
from entprop_wrap.train.options import Options

Entries = dict[str, dict[str, Any]]
PAPER = (0.2, 1), (0.6, 1), (0.2, 5), (0.6, 5)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: Of its figure.
        first: Heading of the first column.
        entries: ``(epsilon, epochs) -> entries``; epsilon None: each method's own.
        paper: Hscore of the paper's table by entry: ResNet-18 on CIFAR-100.
    """

    title: str
    first: str
    entries: Callable[[float | None, int], Entries]
    paper: dict[str, float] = field(default_factory=dict)


def made(name: str, epsilon: float | None, **options: Any) -> Method:
    """Return a method as ``examples/train.py --methods name`` makes it."""
    # A dataset that is not digits: those have an epsilon of their own.
    if not method_parts.field_for(name, method_parts.METHODS[name](), "epsilon"):
        epsilon = None
    return method_parts.build(Options(dataset="", methods=[name], epsilon=epsilon, **options))[name]


def methods(epsilon: float | None, epochs: int) -> Entries:
    """Return every method. Adversarial training takes 5 attack steps, as AdvProp does."""
    retraining = {"epochs": max(1, epochs // 4), "learning_rate": 0.1}
    plain = {
        "vanilla": made("vanilla", epsilon),
        **{f"EntProp k={k} n={n}": made("entprop", epsilon, fraction=k, attack_steps=n) for k, n in PAPER},
        "EntProp k=0.2 n=1, auxiliary images mixed": made("entprop", epsilon, mix_on="auxiliary"),
        "EntProp k=0.2 n=1, random selection": made("random_selection", epsilon),
        "EntProp k=0.2 n=1, shared norms": made("shared_norms", epsilon),
        "MixProp": made("mixprop", epsilon),
        "FastAdvProp": made("fast_advprop", epsilon),
        "AdvProp": made("advprop", epsilon),
        "FineGrainedAdvProp, weak and strong": made("fine_grained_advprop", epsilon),
        "MEADA, in each step": MEADA.cifar(),
        "PGD-AT": made("pgd_at", epsilon, attack_steps=5),
        "TRADES": made("trades", epsilon, attack_steps=5),
        "label smoothing 0.1": made("label_smoothing", epsilon),
        "EntM 0.1": made("entropy_maximisation", epsilon),
        "EntM 0.1 + PGD-AT": made("pgd_at", epsilon, attack_steps=5, entropy_weight=0.1),
    }
    return {
        **{name: {"method": method} for name, method in plain.items()},
        "ME-ADA, data grows": {"method": Vanilla(), "grows": True},
        "vanilla, trained on": {"method": Vanilla(), "start": "vanilla", "recipe": retraining},
        "EntropicRetraining": {"method": EntropicRetraining(), "start": "vanilla", "recipe": retraining},
    }


def components(epsilon: float | None, epochs: int) -> Entries:
    """Return table 7."""
    return {
        "vanilla": {"method": Vanilla()},
        "selection": {"method": EntProp(mix=None, attack_steps=0)},
        "selection + MixUp": {"method": EntProp(attack_steps=0)},
        "selection + free step": {"method": EntProp(mix=None, epsilon=epsilon)},
        "all": {"method": EntProp(epsilon=epsilon)},
    }


def metrics(epsilon: float | None, epochs: int) -> Entries:
    """Return table 8, and random selection."""
    scores = {
        "entropy": uncertainty.entropy,
        "cross-entropy": uncertainty.cross_entropy,
        "confidence": uncertainty.least_confidence,
        "logit margin": uncertainty.logit_margin,
        "random": uncertainty.random,
    }
    return {name: {"method": EntProp(epsilon=epsilon, uncertainty=score)} for name, score in scores.items()}


def fractions(epsilon: float | None, epochs: int) -> Entries:
    """Return table 16: k from 0, which is vanilla training, to 1."""
    shares = {f"{tenths / 10:g}": tenths / 10 for tenths in range(1, 11)}
    rows = {name: {"method": EntProp(fraction=share, epsilon=epsilon)} for name, share in shares.items()}
    return {"0": {"method": Vanilla()}, **rows}


def steps(epsilon: float | None, epochs: int) -> Entries:
    """Return table 17: n from 1 to 5 at k = 0.6."""
    return {str(n): {"method": EntProp(fraction=0.6, attack_steps=n, epsilon=epsilon)} for n in range(1, 6)}


TABLES = {
    "methods": Table("Every method", "method", methods),
    "7": Table(
        "Components of EntProp, k = 0.2, n = 1",
        "components",
        components,
        {
            "vanilla": 61.04,
            "selection": 62.18,
            "selection + MixUp": 64.74,
            "selection + free step": 63.29,
            "all": 65.15,
        },
    ),
    "8": Table(
        "What to select by, k = 0.2, n = 1",
        "score",
        metrics,
        {"entropy": 65.15, "cross-entropy": 64.81, "confidence": 65.48, "logit margin": 64.84},
    ),
    "16": Table(
        "Share k of the batch, n = 1",
        "k",
        fractions,
        {
            "0": 61.04,
            "0.1": 64.41,
            "0.2": 65.15,
            "0.3": 65.32,
            "0.4": 65.20,
            "0.5": 65.92,
            "0.6": 66.17,
            "0.7": 65.61,
            "0.8": 65.87,
            "0.9": 65.66,
            "1": 66.11,
        },
    ),
    "17": Table(
        "Attack steps n, k = 0.6",
        "n",
        steps,
        {"1": 65.40, "2": 66.72, "3": 66.44, "4": 67.06, "5": 66.30},
    ),
}
