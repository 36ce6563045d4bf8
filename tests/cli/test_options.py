"""The command line before anything heavy is imported: what is refused, in how many lines, and how fast."""

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from entprop_wrap.cli import main
from entprop_wrap.cli.options import parse

ROOT = Path(__file__).parents[2]
#: What the extras bring.
EXTRA = (
    "datasets",
    "jinja2",
    "lightning",
    "matplotlib",
    "pyautoattack",
    "sklearn",
    "timm",
    "torchvision",
    "transformers",
)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--severities", "7"], "--severities: invalid choice: 7 (choose from "),
        (["--seeds", "0"], "--seeds: expected an integer of at least 1, found '0'"),
        (["--robustness-images", "0"], "--robustness-images: expected an integer of at least 1, found '0'"),
        (["--epochs", "ten"], "--epochs: expected an integer of at least 1, found 'ten'"),
        (["--attack", "4/0"], "--attack: expected a number such as 4/255 or 0.016, found '4/0'"),
        (["--methods", "vanilla", "entrop"], "--methods: invalid choice: 'entrop' (choose from "),
        (["--optimizer", "sdg"], "--optimizer: invalid choice: 'sdg' (choose from "),
        (["--learning_rate", "0.1"], "unrecognized arguments: --learning_rate 0.1"),
        (["--pretrained"], "--pretrained: small_cnn has no pretrained weights"),
        (["--linear-probe"], "--linear-probe fits a head on pretrained features: add --pretrained"),
        (["--interpolate", "0.5"], "--interpolate goes back towards a head that has to be fitted first"),
        (["--weights", "x", "--interpolate", "1.5"], "--interpolate: expected a share between 0 and 1, such as 0.5"),
        (["--equal-cost"], "--equal-cost is for fast_advprop"),
        (["--in-memory", "--max-eval", "3"], "--in-memory, --max-eval: not for digits"),
        (["--methods", "vanilla", "entropic_retraining"], "entropic_retraining continues from a trained model"),
    ],
)
def test_what_is_refused(arguments, found, capsys):
    with pytest.raises(SystemExit) as exit:
        parse("", arguments)
    usage, error = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert usage.endswith("[options]")
    assert found in error


def test_a_run_is_not_trained_over(tmp_path, capsys):
    (tmp_path / "entprop-seed1").mkdir()
    (tmp_path / "entprop-seed1" / "metrics.jsonl").touch()
    arguments = ["--output", str(tmp_path), "--seeds", "2"]
    with pytest.raises(SystemExit):
        parse("", arguments)
    assert "entprop-seed1 holds a run. Continue it with --resume" in capsys.readouterr().err
    assert parse("", [*arguments, "--resume"]).resume
    assert parse("", arguments[:2]).seeds == 1


def test_defaults_depend_on_the_data():
    digits, folder = parse("", ["--attack", "4 / 255"]), parse("", ["--dataset", "somewhere", "--epochs", "3"])
    assert (digits.epochs, digits.optimizer, digits.robustness_images, digits.attack) == (60, "sgd", 500, 4 / 255)
    assert (folder.epochs, folder.optimizer, folder.robustness_images, folder.attack) == (3, "adamw", None, None)


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "entprop_wrap.cli.run", None)  # Python then finds no such module
    with pytest.raises(SystemExit, match=r"The command needs more: pip install 'entprop-wrap\[examples\]'"):
        main(["--output", str(tmp_path)])


@pytest.mark.parametrize("command", [["examples/train.py"], ["-m", "entprop_wrap.cli"]])
def test_help_imports_nothing_heavy(command):
    run = f"runpy.run_{'path' if len(command) == 1 else 'module'}({command[-1]!r}, run_name='__main__')"
    code = (
        f"import runpy, sys; sys.argv = ['x', '--help']\ntry: {run}\n"
        "except SystemExit: print([x for x in ('torch', 'numpy', 'accelerate', 'transformers') if x in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "--robustness-images" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_command_is_installed():
    (installed,) = entry_points(group="console_scripts", name="entprop-train")
    assert installed.load() is main


def test_the_library_alone_has_every_public_name_imported_late_and_takes_a_step():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({EXTRA}))\n"  # which Python then does not find
        "import entprop_wrap; early = 'torch' in sys.modules\n"
        "assert all(hasattr(entprop_wrap, name) for name in entprop_wrap.__all__)\n"
        "assert set(entprop_wrap.__all__) <= set(dir(entprop_wrap)) and not hasattr(entprop_wrap, 'AdvProp')\n"
        "import torch\n"
        "layers = torch.nn.BatchNorm2d(3), torch.nn.Flatten(), torch.nn.Linear(12, 2)\n"
        "model = entprop_wrap.wrap(torch.nn.Sequential(*layers))\n"
        "entprop_wrap.training_step(model, torch.rand(40, 3, 2, 2), torch.arange(40) % 2)\n"
        "print(early, entprop_wrap.errors.EntPropError.__name__, sorted(entprop_wrap.__all__) == entprop_wrap.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False EntPropError True\n"
