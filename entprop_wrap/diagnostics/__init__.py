"""Measurements of what a method does to your data and your model, and a monitor for a training run.

All of it leaves the model and torch's random state as they were, and runs on one process. A report
(``entprop_wrap.reporting``) draws and explains entropies, the domain gap and Jacobians.
"""

from entprop_wrap.diagnostics.domain_gap import DomainGap, LayerGap, domain_gap
from entprop_wrap.diagnostics.entropy_stages import EntropyStages, entropy_stages
from entprop_wrap.diagnostics.feature_distance import FeatureDistance, feature_distance
from entprop_wrap.diagnostics.input_jacobian import InputJacobian, input_jacobian
from entprop_wrap.diagnostics.monitor import Monitor
from entprop_wrap.diagnostics.selection_ood import OODScore, SelectionOOD, selection_ood
from entprop_wrap.utils.statistics import Interval

__all__ = [
    "DomainGap",
    "EntropyStages",
    "FeatureDistance",
    "InputJacobian",
    "Interval",
    "LayerGap",
    "Monitor",
    "OODScore",
    "SelectionOOD",
    "domain_gap",
    "entropy_stages",
    "feature_distance",
    "input_jacobian",
    "selection_ood",
]
