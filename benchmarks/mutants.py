"""Errors planted in the switch, the step and the trainer, one at a time: does the suite catch each of them?

    python benchmarks/mutants.py                    # all; minutes for each, prints the survivors
    python benchmarks/mutants.py --only switch --list

A mutant is a text of the product replaced in a copy of the checkout. It is caught if a test of its part fails. Where a
text is no longer in its file, the script stops before it runs anything.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Tests of each part, the likeliest and cheapest first.
TESTS = {
    "switch": [
        "tests/wrapping/test_copies.py",
        "tests/wrapping/test_norms.py",
        "tests/wrapping/test_traps.py",
        "tests/methods/test_lagged.py",
        "tests/wrapping",
    ],
    "step": ["tests/methods/test_entprop_parity.py", "tests/methods/test_methods_parity.py", "tests/methods"],
    "trainer": ["tests/trainer/test_resume.py", "tests/trainer"],
}
NORM, DOMAIN = "wrapping/switched_norm.py", "wrapping/active_domain.py"
ENTPROP, LOOP, STATE = "methods/entprop.py", "trainer/trainer.py", "trainer/run_state.py"

#: Part, file, text, replacement.
MUTANTS = [
    ("switch", NORM, "if key is None:\n            return super()", "if True:\n            return super()"),
    ("switch", NORM, "_entprop_record=record and own_buffers", "_entprop_record=own_buffers"),
    ("switch", NORM, "_entprop_record=record and own_buffers", "_entprop_record=record"),
    ("switch", NORM, "key.total * key.main", "key.total * (key.total - key.main)"),
    ("switch", NORM, "self._entprop_base.forward(view, auxiliary, *args", "super().forward(auxiliary, *args"),
    ("switch", NORM, "parameter.detach().clone(), parameter.requires_grad", "parameter.detach().clone(), True"),
    ("switch", NORM, "parameter is not None and id(parameter) not in cloned", "parameter is not None"),
    ("switch", NORM, 'in norm._parameters.items() if copies != "statistics" else ()', "in norm._parameters.items()"),
    ("switch", NORM, 'in norm._buffers.items() if copies != "affine" else ()', "in norm._buffers.items()"),
    ("switch", NORM, "persistent = name not in norm._non_persistent_buffers_set", "persistent = True"),
    ("switch", NORM, "not isinstance(copy, AuxiliaryNorm) or copy.is_kept()", "not isinstance(copy, AuxiliaryNorm)"),
    ("switch", NORM, "] = value.clone()", "] = value.clone().zero_()"),
    ("switch", NORM, 'view.__dict__["_entprop_record"] or not norm.training', 'view.__dict__["_entprop_record"]'),
    ("switch", NORM, "return iter(()) if recurse else super()", "return super()"),
    ("switch", NORM, "norm.__class__ = norm._entprop_base", "pass"),
    ("switch", DOMAIN, "if task == -1:\n            return self", "if True:\n            return self"),
    ("switch", DOMAIN, "if len(inherited) == 1:", "if inherited:"),
    ("switch", DOMAIN, "state.block, state.key = block, before", "state.block = state.key = None"),
    ("switch", DOMAIN, "self.local = threading.local()", "self.local = type('Shared', (), {})()"),
    ("switch", DOMAIN, "self.pins.pop(task, None)\n        state.key", "state.key"),
    ("switch", "wrapping/registry.py", "elif module.training:", "elif False:"),
    ("switch", "wrapping/registry.py", "or name in registry.shared", ""),
    ("switch", "wrapping/optimizer.py", "norm.requires_grad and not copy.requires_grad", "False"),
    ("switch", "wrapping/rows.py", "calls[name] += 1", "calls[name] = 1"),
    ("switch", "wrapping/rows.py", "<= _TOLERANCE *", "<= 1e9 *"),
    ("switch", "wrapping/rows.py", "tensor.copy_(value)", "pass"),
    ("switch", "utils/modules.py", "module.training = True", "pass"),
    ("switch", "wrapping/optimizer.py", "if id(row[1]) in trained", "if False"),
    ("switch", "wrapping/optimizer.py", "originals.get(name, name)", "name"),
    ("step", ENTPROP, "step.backward(main_loss)", "step.backward(main_loss * number / batch)"),
    ("step", ENTPROP, 'number / batch if self.weighting == "per_image" else 1.0', "1.0"),
    (
        "step",
        ENTPROP,
        "selected = top_k(score, number)\n            step.backward(main",
        "selected = top_k(-score, number)\n            step.backward(main",
    ),
    ("step", ENTPROP, "epsilon / parts if self.step_size is None", "epsilon if self.step_size is None"),
    ("step", ENTPROP, "1 if self.attack_steps <= 1 else self.attack_steps + 1", "max(1, self.attack_steps)"),
    ("step", ENTPROP, "step.auxiliary(self.auxiliary, record_statistics=False)", "step.auxiliary(self.auxiliary)"),
    ("step", ENTPROP, "gradient = mix.apply(gradient)", "pass"),
    ("step", "wrapping/model.py", 'copies not in ("all", registry.held)', "False"),
    ("step", ENTPROP, "fresh = batch - back if self.equal_budget and 2 * back <= batch else batch", "fresh = batch"),
    ("step", ENTPROP, "fresh / batch * main_loss", "main_loss"),
    ("step", "methods/lagged.py", "waiting.fits(images, labels)", "True"),
    ("step", "methods/step.py", "if frozen and _keeps_statistics(module)", "if False"),
    ("step", "methods/step.py", "lambda gradient: gradient * factor", "lambda gradient: gradient"),
    (
        "step",
        "methods/input_gradient.py",
        "index_rows(self.output_gradients[0], selected)",
        "self.output_gradients[0][: len(selected)]",
    ),
    ("step", "methods/input_gradient.py", "<= tolerance * float", "<= 1e9 * float"),
    ("step", "methods/step_loss.py", "if not is_mean(", "if False and not is_mean("),
    ("step", "methods/advprop.py", "losses.append(weights[auxiliary] * loss)", "losses.append(loss)"),
    ("step", "methods/fast_advprop.py", "step.norm_gradients_scaled(None, batch / clean)", "nullcontext()"),
    ("step", "methods/fast_advprop.py", "step.backward((1 - self.beta) * weight", "step.backward(self.beta * weight"),
    ("step", "methods/adversarial_training.py", "loss - self.entropy_weight * mean_entropy(hard)", "loss"),
    ("step", "functional/uncertainty.py", "fraction * batch + 0.5", "fraction * batch"),
    ("step", "functional/targets.py", "self.share * own + (1 - self.share)", "(1 - self.share) * own + self.share"),
    ("step", "functional/attacks.py", ".clamp_(-reach, reach)", ""),
    ("step", "training.py", "before.restore()", "pass"),
    ("step", "methods/input_gradient.py", "or self.uses != 1", ""),
    ("step", "methods/input_gradient.py", "if agrees and _trains(self.calls[0])", "if agrees"),
    ("step", "methods/step.py", "if images._version != version", "if False"),
    ("step", "methods/lagged.py", "another = waiting.owner is not None and", "another = False and"),
    ("trainer", LOOP, "self._train(images, labels, size)", "self._train(images, labels, 1)"),
    (
        "trainer",
        LOOP,
        "min(config.gradient_accumulation_steps, length - position.batch)",
        "config.gradient_accumulation_steps",
    ),
    ("trainer", LOOP, "module.training = False", "pass"),
    ("trainer", LOOP, "position.best[metric] = found[metric]", "pass"),
    ("trainer", LOOP, "values, finite, batches = state.meter.read", "values, batches, finite = state.meter.read"),
    (
        "trainer",
        "trainer/data_loader.py",
        "seed_of(self.seed, self.epoch, index, *number)",
        "seed_of(self.seed, index, *number)",
    ),
    ("trainer", "trainer/data_loader.py", "batch_sampler=batches[start:]", "batch_sampler=batches"),
    (
        "trainer",
        "trainer/data_loader.py",
        "batches[self.process : even : self.processes]",
        "batches[self.process :: self.processes]",
    ),
    ("trainer", "trainer/data_loader.py", "generator=torch.Generator().manual_seed(", "generator=(lambda _: None)("),
    ("trainer", STATE, 'self.meter.load_state_dict(own["meter"], device)', "pass"),
    ("trainer", STATE, "load_lagged_state(self.model, lagged)", "pass"),
    ("trainer", STATE, 'self.average.n_averaged.fill_(shared["averaged"])', "pass"),
    ("trainer", STATE, 'self.generator.set_state(own["step"])', "pass"),
    ("trainer", STATE, 'self.schedule.load_state_dict(shared["schedule"])', "pass"),
    ("trainer", "trainer/checkpoint.py", "if sha256(checkpoint / name) != digest:", "if False:"),
    ("trainer", "trainer/checkpoint.py", 'value < than if metric == "loss" else value > than', "value > than"),
    ("trainer", "trainer/ema.py", "mean.copy_(buffer)", "pass"),
    ("trainer", "trainer/run_identity.py", '(alike if key == "data" else operator.eq)', "(lambda *a: True)"),
    ("trainer", "trainer/evaluation.py", "number >= batches.number", "False"),
]


def main():
    options = parse()
    chosen = [mutant for mutant in MUTANTS if options.only in (None, mutant[0])]
    for part, file, text, _ in chosen:
        if (count := (ROOT / "entprop_wrap" / file).read_text().count(text)) == 0:
            raise SystemExit(f"{file} does not hold {text!r} ({part}): {count} times.")
    if options.list:
        print(*(f"{part}: {file}: {text!r} -> {new!r}" for part, file, text, new in chosen), sep="\n")
        return
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "entprop"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "*cache*", "site"))
        (copy / "entprop_wrap/integrations").symlink_to("../integrations")
        for number, (part, file, text, new) in enumerate(chosen, start=1):
            if number < options.first:
                continue
            path = copy / "entprop_wrap" / file
            original = path.read_text()
            path.write_text(original.replace(text, new))
            caught = run_tests(copy, TESTS[part])
            path.write_text(original)
            survivors += [] if caught else [f"{file}: {text!r} -> {new!r}"]
            print(f"{number}/{len(chosen)} {'caught ' if caught else 'SURVIVED'} {file}: {text!r} {caught}", flush=True)
    print(f"{len(survivors)} of {len(chosen) - options.first + 1} survived", *survivors, sep="\n")


def run_tests(copy, stages):
    """Return the first test that fails, or an empty text; a stage is collected when those before it have passed."""
    return next(filter(None, (run_stage(copy, stage) for stage in stages)), "")


def run_stage(copy, tests):
    """Return the first test of a file or folder that fails, or an empty text."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "-rfE",
        tests,
    ]
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if result.returncode > 2:
        raise SystemExit(f"{tests}: {result.stderr}")
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return (failed or [result.stdout[-200:] + result.stderr[-200:]])[0] if result.returncode else ""


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TESTS), help="mutants of this part alone")
    parser.add_argument("--first", type=int, default=1, help="number of the mutant to begin with")
    parser.add_argument("--list", action="store_true", help="print the mutants and check that their texts are there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
