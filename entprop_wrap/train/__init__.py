"""Train and compare on a command line: ``entprop-train``, ``python -m entprop_wrap.train`` or ``examples/train.py``."""

from entprop_wrap.train.command import main

__all__ = ["main"]
