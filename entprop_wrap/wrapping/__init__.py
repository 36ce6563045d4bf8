"""Auxiliary norms: which layers get them, how one layer switches, which domain is active. Knows nothing of training."""

from entprop_wrap.wrapping.model import Summary, auxiliary, is_wrapped, summary, unwrap, wrap
from entprop_wrap.wrapping.optimizer import check_optimizer, parameter_groups
from entprop_wrap.wrapping.state_dict import (
    auxiliary_state_dict,
    load_auxiliary_state_dict,
    main_state_dict,
    strip_copies,
    without_copies,
)

__all__ = [
    "Summary",
    "auxiliary",
    "auxiliary_state_dict",
    "check_optimizer",
    "is_wrapped",
    "load_auxiliary_state_dict",
    "main_state_dict",
    "parameter_groups",
    "strip_copies",
    "summary",
    "unwrap",
    "without_copies",
    "wrap",
]
