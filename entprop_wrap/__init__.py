"""EntProp for any PyTorch image classifier: train for accuracy and robustness, get your own model back."""

from entprop_wrap.optimizers import check_optimizer, parameter_groups
from entprop_wrap.state_dicts import auxiliary_state_dict, load_auxiliary_state_dict, main_state_dict
from entprop_wrap.wrapping import auxiliary, summary, unwrap, wrap

__all__ = [
    "auxiliary",
    "auxiliary_state_dict",
    "check_optimizer",
    "load_auxiliary_state_dict",
    "main_state_dict",
    "parameter_groups",
    "summary",
    "unwrap",
    "wrap",
]
