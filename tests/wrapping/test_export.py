"""Export, tracing and surgery: after ``unwrap`` everything works as on a plain model, and the main path before."""

import copy
import gc
import io
import sys

import pytest
import torch

import entprop_wrap as entprop
from tests.helpers.architectures import ARCHITECTURES, logits_of
from tests.helpers.norm_nets import rows, toy
from tests.helpers.oracle import perturb
from tests.helpers.versions import needs_recent_torch

EXPORTED = ("torchvision/resnet", "timm/vit")


def _trained(name):
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model = entprop.wrap(architecture.build())
    perturb(model)
    with entprop.auxiliary(model):
        model(architecture.images())
    return model.eval(), architecture.images()


@pytest.mark.parametrize("name", EXPORTED)
def test_torch_export(name):
    model, images = _trained(name)
    want = logits_of(model(images))
    program = torch.export.export(entprop.unwrap(model), (images,))
    torch.testing.assert_close(program.module()(images), want)
    assert not any("entprop" in key for key in program.state_dict)


@needs_recent_torch
def test_the_main_path_of_a_wrapped_model_exports_too():
    model = entprop.wrap(toy("batch")).eval()
    perturb(model)
    program = torch.export.export(model, (rows(),))
    torch.testing.assert_close(program.module()(rows()), model(rows()))
    torch.testing.assert_close(torch.jit.trace(model, (rows(),))(rows()), model(rows()))


@needs_recent_torch
def test_the_auxiliary_path_exports_too():
    model = entprop.wrap(toy("batch")).eval()
    perturb(model)
    with entprop.auxiliary(model):
        program = torch.export.export(model, (rows(),))
        want = model(rows())
    torch.testing.assert_close(program.module()(rows()), want)
    assert not torch.equal(want, model(rows()))


def _calls(model, images):
    """Return every function, of Python or C, that one pass calls, in order."""
    called = []

    def note(frame, event, function):
        if event in ("call", "c_call"):
            code = frame.f_code
            called.append((code.co_filename, code.co_name) if event == "call" else function.__qualname__)

    model(images)  # what is made in a first pass
    gc.disable()  # which calls what it likes
    sys.setprofile(note)
    try:
        model(images)
    finally:
        sys.setprofile(None)
        gc.enable()
    return called


@pytest.mark.parametrize("name", EXPORTED)
def test_an_unwrapped_model_costs_what_it_cost_before(name):
    """Every call of a pass, and so its time, is that of a model that was never wrapped."""
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    plain = architecture.build().eval()
    model = entprop.wrap(copy.deepcopy(plain))
    images = architecture.images()
    assert len(_calls(model, images)) > len(_calls(plain, images))
    assert _calls(entprop.unwrap(model), images) == _calls(plain, images)
    assert torch.equal(logits_of(model(images)), logits_of(plain(images)))


def test_an_unwrapped_model_saves_without_this_package():
    file = io.BytesIO()
    torch.save(entprop.unwrap(entprop.wrap(toy("batch"))), file)
    assert b"entprop_wrap" not in file.getvalue()
