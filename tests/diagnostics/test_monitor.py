"""A healthy run raises no alarm, and runs that fail do, each by its own."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import entprop_wrap as entprop
from entprop_wrap import EntProp, Trainer, TrainerConfig
from entprop_wrap.diagnostics import Monitor
from entprop_wrap.diagnostics.monitor import _energy_auroc
from entprop_wrap.diagnostics.selection_ood import _auroc
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.uncertainty import entropy
from entprop_wrap.functional.uncertainty import random as random_score
from entprop_wrap.methods import MixProp
from entprop_wrap.methods.step_output import StepOutput
from tests.helpers.trainer_toys import BatchNormNet, Images, make

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")
EVERY = 10


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def run(monitor, method=None, spoil=None):
    """Train on digits in a plain loop; return the validation accuracy."""
    raw, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    images, labels = torch.tensor(raw / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order], torch.tensor(labels)[order]
    model, method = network(), method or EntProp(fraction=0.3)
    if method.auxiliaries:
        entprop.wrap(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(120):
        rows = torch.randint(600, (32,), generator=generator)
        monitor.update(
            entprop.training_step(model.train(), images[rows], labels[rows], method=method, generator=generator)
        )
        optimizer.step()
        optimizer.zero_grad()
        if spoil is not None:
            spoil(model, step)
        if step % 20 == 19:
            with torch.no_grad():
                logits = model.eval()(images[600:900])
            monitor.evaluated({"loss": float(F.cross_entropy(logits, labels[600:900]))})
    return float((logits.argmax(1) == labels[600:900]).float().mean())


@pytest.mark.parametrize("method", [EntProp(fraction=0.3), MixProp()], ids=["entprop", "mixprop"])
def test_a_healthy_run_gives_no_warning(method):
    monitor = Monitor(every=EVERY)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Selected|The auxiliary|Training and validation")
        accuracy = run(monitor, method)
    assert monitor.warnings == {}
    assert accuracy > 0.85


def failing(match, method=None, **options):
    monitor = Monitor(every=EVERY)
    with pytest.warns(UserWarning, match=match) as caught:
        run(monitor, method, **options)
    assert sum(match in str(one.message) for one in caught) == 1  # once
    return monitor.warnings


def test_a_random_selection_is_found_out():
    found = failing("no more uncertain than random", EntProp(fraction=0.3, uncertainty=random_score))
    assert set(found) == {"selection"}
    assert "nats of all" in found["selection"]


def test_a_growing_auxiliary_loss_is_found_out():
    def spoil(model, step):
        if step > 40:
            model[4].get_submodule("entprop_aux").bias.data.copy_(0.1 * (step - 40) * torch.randn(32))

    found = failing("auxiliary loss has grown", spoil=spoil)
    assert set(found) == {"auxiliary loss"}


def output(main=0.5, aux=0.6, entropy=0.5, selected_entropy=1.0, selected_logits=0.0, device="cpu"):
    """What a step of ten images and ten classes gives, two of them selected."""
    logits = torch.ones(10, 10)
    logits[:2] = selected_logits
    entropies = torch.full((10,), entropy)
    entropies[:2] = selected_entropy
    result = StepOutput(
        loss=torch.tensor(main + aux),
        main_loss=torch.tensor(main),
        logits=logits,
        entropy=entropies,
        passes=1.2,
        aux_loss=torch.tensor(aux),
        aux_logits=torch.zeros(2, 10),
        selected=torch.tensor([0, 1]),
    )
    tensors = {name: value.to(device) for name, value in vars(result).items() if isinstance(value, torch.Tensor)}
    return replace(result, **tensors)


def test_nothing_is_read_between_two_looks():
    monitor = Monitor(every=4)  # a tensor without data cannot be read
    for _ in range(3):
        monitor.update(output(device="meta"))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        monitor.update(output(device="meta"))


@pytest.mark.parametrize(
    ("windows", "signature"),
    [
        ([{"selected_entropy": 0.5}] * 3, "selection"),
        ([{"selected_entropy": 0.5}] * 2 + [{}] + [{"selected_entropy": 0.5}] * 2, None),  # not in a row
        ([{"entropy": 2.25, "selected_entropy": 2.26}] * 5, None),  # has not begun to learn
        ([{"entropy": 0.0, "selected_entropy": 0.0}] * 3, "selection"),
        ([{}] + [{"aux": 1.5}] * 3, "auxiliary loss"),
        ([{}] + [{"aux": 1.5, "main": 1.5}] * 3, None),  # both grow
        ([{"aux": 0.01}] + [{"aux": 0.1}] * 3, None),  # by nothing that matters
        ([{"aux": 3.6}] * 3, "auxiliary loss"),
        ([{"aux": 3.6, "main": 2.2}] * 3, "auxiliary loss"),
        ([{"aux": 3.6, "main": 3.0}] * 5, "selection"),  # wrong where it is certain
        ([{"entropy": 2.25, "selected_entropy": 2.3, "main": 3.0}] * 5, None),  # certain of nothing
        ([{"selected_logits": 1.0}] * 3, "selection"),  # uncertain, but no further out
        ([{"selected_logits": 2.0}] * 3, "selection"),  # and less so
        ([{"selected_logits": 1.0}] * 2 + [{}] + [{"selected_logits": 1.0}] * 2, None),
        ([{"selected_logits": float("nan")}] * 5, None),
        ([{"aux": float("inf")}], "auxiliary loss"),
        ([{"main": float("nan")}] * 5, None),  # the loop's own affair
    ],
)
def test_what_is_judged(windows, signature):
    monitor = Monitor(every=2)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for window in windows:
            monitor.update(output(**window))
            monitor.update(output(**window))
    assert set(monitor.warnings) == ({signature} if signature else set())


def test_steps_without_an_auxiliary_loss_are_no_part_of_its_mean():
    """As the first of a lagged run."""
    monitor = Monitor(every=2)
    monitor.update(replace(output(aux=1.4), aux_loss=None, aux_logits=None))
    for _ in range(9):
        monitor.update(output(aux=1.4))
    assert monitor.warnings == {}
    monitor.update(replace(output(), aux_loss=None, aux_logits=None))
    with pytest.warns(UserWarning, match="not finite in 1 of the last 1 steps"):
        monitor.update(output(aux=float("inf")))


def noise_output(generator, *, classes=10, scale=2.0, learnt=False):
    """Logits that know nothing of the labels, or add to them, and the selection by entropy."""
    logits = scale * torch.randn(64, classes, generator=generator)
    labels = torch.randint(classes, (64,), generator=generator)
    if learnt:
        logits += 6 * F.one_hot(labels, classes)
    entropies = entropy(logits)
    return StepOutput(
        loss=torch.tensor(1.0),
        main_loss=F.cross_entropy(logits, labels),
        logits=logits,
        entropy=entropies,
        passes=1.2,
        aux_loss=torch.tensor(1.0),
        aux_logits=torch.zeros(13, classes),
        selected=entropies.topk(13).indices,
    )


@pytest.mark.parametrize("classes", [3, 100])
@pytest.mark.parametrize("learnt", [False, True])
def test_logits_that_say_nothing_are_found_out_though_their_entropies_differ(classes, learnt):
    monitor, generator = Monitor(every=10), torch.Generator().manual_seed(0)
    lead = []
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for _ in range(40):
            one = noise_output(generator, classes=classes, learnt=learnt)
            lead.append(float(one.entropy[one.selected].mean() / one.entropy.mean()))
            monitor.update(one)
    assert min(lead) > 1.1  # a comparison of entropies sees no fault in either
    assert set(monitor.warnings) == (set() if learnt else {"selection"})
    if not learnt:
        assert "no further out of the distribution than random ones" in monitor.warnings["selection"]
        assert "no better than a guess" in monitor.warnings["selection"]


def test_the_energy_is_that_of_the_diagnostics():
    one = noise_output(torch.Generator().manual_seed(1))
    energy = -one.logits.logsumexp(1)
    found = _energy_auroc(one.logits, one.selected)
    assert float(found) == pytest.approx(_auroc(energy, energy[one.selected]))
    everything = torch.arange(64)
    assert float(_energy_auroc(one.logits, everything)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("losses", "warned"),
    [
        ([1.0, 0.8, 1.0, 1.1, 1.2], True),
        ([1.0, 0.8, 1.0, 1.1], False),
        ([1.0, 0.8, 0.81, 0.82, 0.83], False),
        ([1.0, 0.8, 1.0, 0.75, 0.9, 0.9], False),
    ],
)
def test_which_evaluations_part(losses, warned):
    monitor = Monitor(every=100)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for number, loss in enumerate(losses):
            monitor.update(output(main=1 / (number + 1)))
            monitor.evaluated({"eval_loss": loss, "eval_accuracy": 0.5})
    assert ("validation" in monitor.warnings) == warned


def test_bad_input_is_refused():
    for options in ({"every": 0}, {"every": 1.5}, {"every": True}):
        with pytest.raises(ConfigurationError):
            Monitor(**options)
    with pytest.raises(TypeError, match="training_step"):
        Monitor().update(torch.tensor(1.0))
    with pytest.raises(ConfigurationError, match="accuracy"):
        Monitor().evaluated({"accuracy": 0.5})
    with pytest.raises(ConfigurationError, match=r"found 1\.3\. Write evaluated\(\{'loss': loss\}\)"):
        Monitor().evaluated(1.3)


class Counting(Monitor):
    seen = evaluations = 0

    def update(self, output):
        self.seen += 1
        super().update(output)

    def evaluated(self, metrics):
        self.evaluations += 1
        super().evaluated(metrics)


def test_the_trainer_tells_its_monitor_and_trains_as_without(tmp_path):
    models = []
    for name, monitor in (("with", Counting(every=2)), ("without", None)):
        config = TrainerConfig(
            output_dir=tmp_path / name, epochs=2, batch_size=10, gradient_accumulation_steps=2, progress=False
        )
        trainer = Trainer(make(BatchNormNet), Images(), Images(seed=1), config=config, monitor=monitor)
        trainer.fit()
        models.append((trainer.model.state_dict(), monitor))
    assert (models[0][1].seen, models[0][1].evaluations) == (8, 2)
    assert all(torch.equal(value, models[1][0][name]) for name, value in models[0][0].items())
    with pytest.raises(TypeError, match="Monitor"):
        Trainer(make(BatchNormNet), Images(), monitor=True)
