"""Two threads run one model in two domains at the same time, each as if it were alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import entprop_wrap as entprop
from entprop_wrap.errors import UnsupportedModelError
from tests.helpers.keys import is_auxiliary_key, original_name
from tests.helpers.norm_nets import rows, toy
from tests.helpers.oracle import auxiliary_tensors, changed, expected_pass, loss_of, perturb, snapshot


def _run(model, batch, auxiliary, parameters):
    """One forward and the gradients of the parameters it used, without touching ``grad``."""
    with entprop.auxiliary(model, auxiliary):
        output = model(batch)
    gradients = torch.autograd.grad(loss_of(output, batch), parameters, allow_unused=True)
    return output.detach(), gradients


@pytest.mark.parametrize("mode", ["none", "plain"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_each_thread_is_in_its_own_domain(norm, mode):
    plain = toy(norm).double()
    model = entprop.wrap(toy(norm, mode).double())
    perturb(model)
    model.eval()
    plain.eval()
    batch = rows(32).double()
    named = dict(model.named_parameters())
    expected = {None: expected_pass(plain, batch), "aux": expected_pass(plain, batch, auxiliary_tensors(model))}
    before, switched = snapshot(model), set(auxiliary_tensors(model))
    start = threading.Barrier(4)

    def work(auxiliary):
        torch.set_num_threads(1)
        start.wait()
        for _ in range(25):
            output, gradients = _run(model, batch, auxiliary, list(named.values()))
            assert torch.equal(output, expected[auxiliary].logits)
            for name, gradient in zip(named, gradients, strict=True):
                key = original_name(name)
                ours = is_auxiliary_key(name) == (auxiliary is not None)
                if ours or key not in switched:
                    torch.testing.assert_close(gradient, expected[auxiliary].gradients[key])
                else:
                    assert gradient is None
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, (None, "aux", None, "aux")))
    assert not changed(model, before)
    assert model._entprop_registry.switch.pins == {}


@pytest.mark.parametrize("mode", ["none", "plain", "reentrant", "nested"])
def test_backwards_overlap_in_time(mode):
    """Both backwards are held up half-way until the other is there too."""
    plain = toy("layer").double()
    model = entprop.wrap(toy("layer", mode).double())
    perturb(model)
    batch = rows().double().requires_grad_()
    expected = {None: expected_pass(plain, batch), "aux": expected_pass(plain, batch, auxiliary_tensors(model))}
    meet = threading.Barrier(2, timeout=20)

    def hold(gradient):
        meet.wait()

    def work(auxiliary):
        with entprop.auxiliary(model, auxiliary):
            output = model(batch)
        meet.wait()
        output.register_hook(hold)
        loss_of(output, batch).backward()
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, (None, "aux")))
    for name, norm, copied in model._entprop_registry.copied_parameters():
        torch.testing.assert_close(norm.grad, expected[None].gradients[name], msg=name)
        torch.testing.assert_close(copied.grad, expected["aux"].gradients[name], msg=name)
    assert model._entprop_registry.switch.pins == {}


def test_an_unpinned_backward_does_not_take_the_domain_of_another_thread():
    model = entprop.wrap(toy("layer", "plain"))
    batch = rows()
    inside, done = threading.Event(), threading.Event()

    def other():
        with entprop.auxiliary(model):
            output = model(batch)
        # The pin's own hook comes first; from then on this backward is under way.
        output.register_hook(lambda gradient: (inside.set(), done.wait(20))[0])
        loss_of(output, batch).backward()

    features = model._blocks(model.stem(batch))  # not by way of model(...): nobody knows its domain
    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(20)
    try:
        with pytest.raises(UnsupportedModelError, match="did not come from calling the wrapped model"):
            features.sum().backward()
    finally:
        done.set()
        thread.join()


def test_a_new_thread_starts_in_the_main_domain():
    model = entprop.wrap(toy())
    perturb(model)
    want = model(rows())
    with entprop.auxiliary(model), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(model, rows()).result(), want)


def test_compiled_models_in_two_threads():
    torch._dynamo.reset()
    model = entprop.wrap(toy("layer"))
    perturb(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = rows()
    wanted = {}
    for auxiliary in (None, "aux"):
        with entprop.auxiliary(model, auxiliary), torch.no_grad():
            wanted[auxiliary] = model(batch)
            compiled(batch)

    def work(auxiliary):
        for _ in range(20):
            with entprop.auxiliary(compiled, auxiliary), torch.no_grad():
                torch.testing.assert_close(compiled(batch), wanted[auxiliary])
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, (None, "aux")))


def test_a_recomputation_in_the_backwards_of_two_domains_is_refused():
    model, batch = entprop.wrap(toy("batch", "nested")), rows(4)
    model.train()
    output = model(batch)

    def another(gradient):
        with torch.enable_grad():
            with entprop.auxiliary(model):
                hard = model(batch)
            loss_of(hard, batch).backward()

    output.register_hook(another)
    with pytest.raises(UnsupportedModelError, match="its domain is unknown"):
        loss_of(output, batch).backward()
