"""Every public function, given what nobody should give it: it works, or raises an error of ours that says why.

500 calls in an ordinary run; ``ENTPROP_FUZZ=10000 pytest -n0 -s tests/faults/test_fuzz.py`` for more. The calls follow
from the signatures and from nothing random: two runs make the same ones.
"""

import ast
import collections
import functools
import inspect
import linecache
import numbers
import os
import sys
import traceback
import types
import typing
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import entprop_wrap
from entprop_wrap.errors import EntPropError
from tests.faults.fuzz_targets import TARGETS, batch, folder, model
from tests.faults.fuzz_values import VALUES, make

CASES = int(os.environ.get("ENTPROP_FUZZ", "500"))
PACKAGE = Path(entprop_wrap.__file__).parent

GOOD = ("accepted", "ours", "theirs")

#: Where the documentation allows more than the type of the attribute says.
ALSO = {("PixelSpace", "mean"), ("PixelSpace", "std"), ("FineGrainedAdvProp", "weight")}


def outcome(target, replaced):
    """Call ``target`` with good arguments, some of them ``replaced`` by entries of VALUES, and judge what happens.

    Returns:
        "accepted"; "ours", an error that says why, or "theirs", one of a model or loss of the caller's while it runs;
        or what must not be: "raw", an error of Python, torch or NumPy; "nonsense", accepted against the type; or
        "changed", a model or folder that an error left as it was not before. And a text that says more.
    """
    arguments = target.good()
    arguments |= {parameter: make(value) for parameter, value in replaced.items()}
    watched = [value for value in arguments.values() if isinstance(value, nn.Module)]
    before, files = [state(one) for one in watched], set(folder().rglob("*"))
    try:
        result = target.function(**arguments)
        if hasattr(result, "__enter__"):
            with result:
                pass
        use(result)
    except Exception as error:
        if not is_ours(error) and not is_theirs(error):
            return "raw", "".join(traceback.format_exception_only(error)).strip()[:200] + " at " + place(error)
        if any(not same(old, state(one)) for old, one in zip(before, watched, strict=True)):
            return "changed", f"weights, buffers, gradients or modes were changed before {error}"
        if left := set(folder().rglob("*")) - files:
            return "changed", f"{sorted(left)[0]} was written before {error}"
        return "theirs" if is_theirs(error) else "ours", f"{type(error).__name__}: {error}"
    for parameter in replaced:
        if (target.name, parameter) not in ALSO and not fits(arguments[parameter], target.hint(parameter)):
            return "nonsense", f"{parameter}={replaced[parameter]} was accepted as {target.hint(parameter)}"
    return "accepted", ""


def use(result):
    """Have an accepted method run a step, so that nonsense shows."""
    if hasattr(result, "auxiliaries") and hasattr(result, "step") and steps_of(result) <= 3:
        auxiliaries = result.auxiliaries
        net = model(wrapped=not auxiliaries or auxiliaries == ("aux",), training=True)
        if auxiliaries and auxiliaries != ("aux",):
            entprop_wrap.wrap(net, auxiliaries=auxiliaries)
        entprop_wrap.training_step(net, *batch(), method=result)


def steps_of(method):
    parts = [method, getattr(method, "attack", None), getattr(method, "ascent", None)]
    found = [getattr(part, name, 0) for part in parts for name in ("steps", "attack_steps")]
    return max((steps for steps in found if isinstance(steps, int)), default=0)


def state(module):
    tensors = [*module.named_parameters(), *module.named_buffers()]
    gradients = [(name, p.grad) for name, p in module.named_parameters() if p.grad is not None]
    kept = [(name, None if tensor.is_meta else tensor.detach().clone()) for name, tensor in [*tensors, *gradients]]
    return kept, [(name, type(m), m.training, len(m._forward_hooks)) for name, m in module.named_modules()]


def same(one, other):
    if one[1] != other[1] or [name for name, _ in one[0]] != [name for name, _ in other[0]]:
        return False
    pairs = zip(one[0], other[0], strict=True)
    return all(a is b or torch.equal(a, b) for (_, a), (_, b) in pairs)


def is_ours(error):
    """Return whether an error was raised by a ``raise`` in this package, and tells what was expected and found."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, EntPropError) or not str(frame.filename).startswith(str(PACKAGE)):
        return isinstance(error, EntPropError)
    raised = (frame.lineno, getattr(frame, "colno", None)) in raises(frame.filename)
    return raised and isinstance(error, (TypeError, ValueError, ImportError)) and len(str(error)) > 20


def is_theirs(error):
    """Return whether an error arose within a module of the caller's."""
    frames = traceback.extract_tb(error.__traceback__)
    last = max((n for n, frame in enumerate(frames) if str(frame.filename).startswith(str(PACKAGE))), default=-1)
    return any(frame.name == "_call_impl" for frame in frames[last + 1 :])


@functools.cache
def raises(filename):
    nodes = ast.walk(ast.parse("".join(linecache.getlines(filename))))
    places = [(node.lineno, node.col_offset) for node in nodes if isinstance(node, ast.Raise)]
    return {*places, *((line, None) for line, _ in places)}  # Python 3.10 does not know the column


def place(error):
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if str(frame.filename).startswith(str(PACKAGE))]
    last = (inside or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def fits(value, hint):
    """Return whether ``value`` is of the type ``hint``, as far as that is plain: numbers, text, flags and choices."""
    value = value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint in (int, bool, str, type(None)):
        return isinstance(value, hint) and isinstance(value, bool) == (hint is bool)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        return isinstance(value, (str, type(None))) and value in inner
    if inspect.isclass(origin) and issubclass(origin, (tuple, list, collections.abc.Sequence)):
        return not isinstance(value, (str, bytes, bytearray, type(None), bool, int, float, dict))
    if inspect.isclass(origin) and issubclass(origin, collections.abc.Mapping):
        return isinstance(value, collections.abc.Mapping)
    return True


def is_default(target, parameter, value):
    default = target.default(parameter)
    made = make(value)
    return made is default or (type(made) is type(default) and isinstance(made, (int, float, str)) and made == default)


SINGLE = [(target, parameter) for target in TARGETS.values() for parameter in target.parameters]
pytestmark = pytest.mark.filterwarnings("ignore")


@st.composite
def calls(draw):
    """Draw a function, one or two of its parameters, and what to put there."""
    target, parameter = draw(st.sampled_from(SINGLE))
    replaced = {parameter: draw(st.sampled_from(VALUES))}
    if draw(st.integers(0, 3)) == 0:
        replaced[draw(st.sampled_from(target.parameters))] = draw(st.sampled_from(VALUES))
    return target.name, replaced


def test_every_call_works_or_says_why():
    found = collections.Counter()
    problems = []

    @settings(
        max_examples=CASES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(calls())
    def call(case):
        name, replaced = case
        if any(is_default(TARGETS[name], *one) for one in replaced.items()):
            return
        kind, said = judged(name, replaced)
        found[kind] += 1
        if kind not in GOOD:
            shown = ", ".join(f"{key}={value}" for key, value in replaced.items())
            problems.append(f"{kind}: {name}({shown}): {said}")

    call()
    print(f"\n{sum(found.values())} calls of {len(TARGETS)} functions: {dict(found)}")
    assert not problems, "\n".join([f"{len(problems)} calls:", *sorted(set(problems))[:200]])


def judged(name, replaced):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return outcome(TARGETS[name], replaced)
