"""The trainer: whole training runs on Accelerate."""

from entprop_wrap.trainer.config import TrainerConfig
from entprop_wrap.trainer.trainer import Trainer

__all__ = ["Trainer", "TrainerConfig"]
