"""Scripts of examples/ and benchmarks/, and notebooks, run in this process: imports take longer than most of them."""

import contextlib
import importlib.util
import io
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

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


@contextlib.contextmanager
def working_in(folder):
    """Work in another folder, with an environment of its own; give a stream of all that is printed."""
    before, printed = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with mock.patch.dict(os.environ), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield printed
    finally:
        os.chdir(before)


def run_script(path, folder, *arguments):
    """Run a script in ``folder`` as ``python path arguments`` does; return its exit code and what it printed."""
    code, path = 0, str(ROOT / path)
    argv, sys_path = [path, *map(str, arguments)], [str(Path(path).parent), *sys.path]
    with working_in(folder) as printed, mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "path", sys_path):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
    return code, printed.getvalue()
