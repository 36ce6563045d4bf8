"""``python -m entprop_wrap.train``."""

from entprop_wrap.train import main

main()
