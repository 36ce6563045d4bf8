"""What the oldest supported torch cannot do yet, for tests that need it."""

import pytest
import torch
from packaging.version import Version

#: In torch 2.6 FSDP2 needs a GPU, compiled checkpoints record statistics twice, and export allows one set of guards.
RECENT_TORCH = Version(torch.__version__).release >= (2, 7)

needs_recent_torch = pytest.mark.skipif(not RECENT_TORCH, reason="needs torch 2.7")
