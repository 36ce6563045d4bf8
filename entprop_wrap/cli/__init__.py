"""Train and compare on a command line: ``entprop-train``, ``python -m entprop_wrap.cli`` or ``examples/train.py``."""

from entprop_wrap.cli.command import main

__all__ = ["main"]
