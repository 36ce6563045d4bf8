"""Scripts of examples/ and benchmarks/, imported as modules, to be run with a command line in this process."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load(path, monkeypatch):
    """Import a script with its own folder on the path, as Python does when it runs it."""
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def call(module, monkeypatch, *arguments):
    """Run its main() with a command line."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()
