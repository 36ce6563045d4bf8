"""Pure functions of tensors: attacks, losses, mixing, uncertainty."""

from entprop_wrap.functional import attacks, losses, mixing, uncertainty
from entprop_wrap.functional.attacks import PGD, Attack
from entprop_wrap.functional.mixing import CutMix, Mixer, MixUp

__all__ = ["PGD", "Attack", "CutMix", "MixUp", "Mixer", "attacks", "losses", "mixing", "uncertainty"]
