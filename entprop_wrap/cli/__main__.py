"""``python -m entprop_wrap.cli``."""

from entprop_wrap.cli import main

main()
