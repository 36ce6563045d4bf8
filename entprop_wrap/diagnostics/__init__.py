"""Measurements of what a method does to your data and your model, and a monitor for a training run.

All of it leaves the model and torch's random state as they were, and runs on one process. Plots are in
``entprop_wrap.diagnostics.plots``, which needs matplotlib.
"""

from entprop_wrap.diagnostics.domain_gap import DomainGap, LayerGap, domain_gap
from entprop_wrap.diagnostics.entropy_stages import EntropyStages, entropy_stages
from entprop_wrap.diagnostics.feature_distance import FeatureDistance, FeaturePicture, feature_distance, feature_picture
from entprop_wrap.diagnostics.frechet import frechet_distance
from entprop_wrap.diagnostics.input_jacobian import InputJacobian, input_jacobian
from entprop_wrap.diagnostics.monitor import Monitor
from entprop_wrap.diagnostics.selection_ood import OODScore, SelectionOOD, auroc, fpr95, selection_ood
from entprop_wrap.utils.statistics import Interval

__all__ = [
    "DomainGap",
    "EntropyStages",
    "FeatureDistance",
    "FeaturePicture",
    "InputJacobian",
    "Interval",
    "LayerGap",
    "Monitor",
    "OODScore",
    "SelectionOOD",
    "auroc",
    "domain_gap",
    "entropy_stages",
    "feature_distance",
    "feature_picture",
    "fpr95",
    "frechet_distance",
    "input_jacobian",
    "selection_ood",
]
