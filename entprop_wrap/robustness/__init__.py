"""Robustness, measured: corruptions, attacks, shifts, and the scores SA, RA and Hscore."""

from entprop_wrap.robustness.attacks import FGSM, PGD
from entprop_wrap.robustness.autoattack import AutoAttack
from entprop_wrap.robustness.comparison import Comparison, Estimate, compare
from entprop_wrap.robustness.corruptions import CORRUPTIONS, SUITES, corrupt, corruption
from entprop_wrap.robustness.evaluation import accuracy_against_epsilon, evaluate_robustness
from entprop_wrap.robustness.result import RobustnessResult
from entprop_wrap.robustness.scores import Scores, hscore

__all__ = [
    "CORRUPTIONS",
    "FGSM",
    "PGD",
    "SUITES",
    "AutoAttack",
    "Comparison",
    "Estimate",
    "RobustnessResult",
    "Scores",
    "accuracy_against_epsilon",
    "compare",
    "corrupt",
    "corruption",
    "evaluate_robustness",
    "hscore",
]
