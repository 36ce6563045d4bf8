"""The parts of examples/train.py, imported from where they are: ``from example_parts import comparison, sweep``.

The folder examples/ is no package. It is on the path of a script in it, and of no other.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "parts"

if "parts" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "parts", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    sys.modules["parts"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["parts"])

comparison = importlib.import_module("parts.comparison")
methods = importlib.import_module("parts.methods")
sweep = importlib.import_module("parts.sweep")
