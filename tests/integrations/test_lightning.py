"""The Lightning callback: gradients against a hand-written loop and against entprop.training_step, bit for bit."""

import copy
from types import SimpleNamespace

import pytest

pytest.importorskip("lightning", reason="lightning is not installed")

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

import entprop_wrap as entprop
from entprop_wrap import EntProp
from entprop_wrap.integrations.lightning import EntPropLightningCallback
from entprop_wrap.methods import FastAdvProp, Vanilla
from entprop_wrap.methods.lagged import lagged_state
from entprop_wrap.wrapping.model import is_wrapped
from tests.helpers.every_method import METHODS
from tests.helpers.processes import run_processes
from tests.integrations import hf_trainer_reference
from tests.integrations.lightning_reference import (
    SPACE,
    Batches,
    Classifier,
    RecordingMixer,
    by_hand,
    images,
    loader,
    net,
    trainer,
    worst,
)

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")
LAGGED = EntProp(fraction=0.5, lagged=True)


def callback(method=None, **options):
    return EntPropLightningCallback(method or EntProp(fraction=0.5), pixel_space=SPACE, **options)


def fp16():
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=128.0))}


CASES = {
    "plain": ({}, {}),
    "accumulate 4, uneven": ({"accumulate_grad_batches": 4}, {"accumulate": 4}),
    "clip": ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}, {"accumulate": 2, "clip": 0.05}),
    "bf16": ({"precision": "bf16-mixed"}, {"amp": torch.bfloat16}),
    "fp16, clip": (
        lambda: {**fp16(), "accumulate_grad_batches": 4, "gradient_clip_val": 0.05},
        {"amp": torch.float16, "scale": 128.0, "accumulate": 4, "clip": 0.05},
    ),
}


def assert_as_by_hand(module, model, *, batches=None, loss=None, limit=1e-5, options=None, **settings):
    """Fit ``module`` with these options; its gradients are those of ``model`` trained by hand with these settings."""
    mixer = RecordingMixer()
    added = callback(EntProp(fraction=0.5, mix=mixer), loss=loss)
    trainer(added, **(options or {})).fit(module, batches or loader())
    expected, _ = by_hand(model, loader(), draws=mixer.draws, **settings)
    assert worst(module.gradients, expected) < limit
    assert not is_wrapped(module)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_a_loop_by_hand(case):
    options, settings = CASES[case]
    module, model = Classifier(), net()
    options = options() if callable(options) else options
    assert_as_by_hand(module, model, limit=1e-3 if "amp" in settings else 1e-5, options=options, **settings)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(module.model.state_dict()[key], value, rtol=1e-4, atol=1e-5)


class OfTheHub(Classifier):
    """A model of transformers, as users write it down, and recomputed in the backward or not."""

    def __init__(self, name, recomputed):
        super().__init__(hf_trainer_reference.build(name))
        if recomputed:
            self.model.gradient_checkpointing_enable({"use_reentrant": recomputed == "reentrant"})

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(pixel_values=batch[0]).logits, batch[1])


class Logits(nn.Module):
    """The same model, whose output is the logits."""

    def __init__(self, name):
        super().__init__()
        self.model = hf_trainer_reference.build(name)

    def forward(self, x):
        return self.model(pixel_values=x).logits


@pytest.mark.parametrize(
    ("name", "recomputed"), [("ViT", ""), ("ResNet", ""), ("ViT", "reentrant"), ("ViT", "not reentrant")]
)
def test_gradients_of_models_of_the_hub_equal_a_loop_by_hand(name, recomputed):
    options = {"accumulate_grad_batches": 2}
    assert_as_by_hand(OfTheHub(name, recomputed), Logits(name), options=options, accumulate=2, prefix="")


@pytest.mark.parametrize(("method", "accumulate"), [(EntProp(0.5, 3), 1), (LAGGED, 1), *((m, 4) for m in METHODS)])
def test_gradients_equal_the_training_step_bit_for_bit(method, accumulate):
    module = Classifier()
    torch.manual_seed(5)
    data = loader(20) if isinstance(method, FastAdvProp) else loader()  # which needs four images
    trainer(callback(method), accumulate_grad_batches=accumulate).fit(module, data)

    model = entprop.wrap(net(), auxiliaries=method.auxiliaries) if method.auxiliaries else net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(5)
    steps, batches = [], list(data)
    for index, batch in enumerate(batches):
        if index % accumulate == 0:
            optimizer.zero_grad()
        entprop.training_step(
            model, *batch, method=method, pixel_space=SPACE, backward=lambda loss: (loss / accumulate).backward()
        )
        if (index + 1) % accumulate == 0 or index + 1 == len(batches):
            steps.append({"model." + n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            optimizer.step()
    assert worst(module.gradients, steps) == 0
    assert module.after_backward == len(batches)  # hooks around a backward come once a step


def test_vanilla_is_what_lightning_does_alone():
    alone, module = Classifier(), Classifier()
    trainer(accumulate_grad_batches=2, gradient_clip_val=0.1).fit(alone, loader())
    trainer(callback(Vanilla()), accumulate_grad_batches=2, gradient_clip_val=0.1).fit(module, loader())
    assert worst(module.gradients, alone.gradients) == 0


def test_accumulation_may_change_between_epochs():
    module, model = Classifier(), net()
    trainer(callback(EntProp(0.5, mix=None)), GradientAccumulationScheduler({0: 1, 1: 3}), max_epochs=2).fit(
        module, loader()
    )
    first, _ = by_hand(model, loader(), epochs=1)
    assert len(module.gradients) == len(first) + 2
    assert worst(module.gradients[: len(first)], first) < 1e-5


class Own(Classifier):
    """The LightningModule is the classifier, its loss an attribute, and its step returns a dict."""

    def __init__(self):
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.outputs = []
        inner = self.model
        del self.model
        self.conv, self.bn, self.ln, self.fc = inner.conv, inner.bn, inner.ln, inner.fc

    def forward(self, x):
        return self.fc(self.ln(F.relu(self.bn(self.conv(x))).mean((2, 3))))

    def training_step(self, batch):
        logits = self(batch["image"])
        return {"loss": self.criterion(logits, batch["label"]), "right": logits.argmax(-1) == batch["label"]}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.outputs.append(outputs)


def test_a_module_that_is_the_classifier_with_its_own_loss():
    module = Own()
    batches = Batches({"image": x, "label": y} for x, y in loader())
    assert_as_by_hand(module, net(), batches=batches, prefix="", smoothing=0.1)
    assert module.outputs[0]["right"].dtype == torch.bool
    assert "forward" not in vars(module)


class Late(Classifier):
    """Makes its model in the last hook there is for it, with a model of Hugging Face's kind of output."""

    def __init__(self):
        super().__init__()
        self.model = None

    def configure_model(self):
        if self.model is None:
            self.model = Named(net())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(pixel_values=batch[0]).logits, batch[1])


class Named(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.inner(pixel_values))


def test_a_model_that_is_made_late_and_names_its_logits():
    assert_as_by_hand(Late(), net(), prefix="model.inner.")


# What is left behind, and what is written -----------------------------------------------------------------------------


def test_fit_leaves_a_plain_module_and_logs():
    module = Classifier()
    before = set(module.state_dict()), type(module.model.bn), type(module)
    fitted = trainer(callback())
    fitted.fit(module, loader(), loader(8))
    assert (set(module.state_dict()), type(module.model.bn), type(module)) == before
    assert not is_wrapped(module)
    logged = fitted.callback_metrics
    assert {"train_loss", "main_loss", "aux_loss", "main_entropy", "aux_entropy", "loss"} == set(logged)
    assert 0 < logged["aux_entropy"] < 1.61
    evaluated = module.evaluated[-2:]
    model = module.model.eval()
    expected = [model(x) for x, _ in loader(8)]
    assert torch.equal(torch.cat(evaluated), torch.cat(expected))  # the main domain, while fitting
    module.evaluated.clear()
    fitted.test(module, loader(8), verbose=False)
    assert torch.equal(torch.cat(module.evaluated), torch.cat(expected))


class Seeded(L.Callback):
    """Draws that depend on the step alone, so that resuming can be compared."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


def adam(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr)


def states(module, fitted):
    return copy.deepcopy([module.state_dict(), fitted.optimizers[0].state_dict()["state"]])


def same(found, expected):
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    return torch.equal(found, expected)


@pytest.mark.parametrize("method", [EntProp(fraction=0.5), LAGGED], ids=["", "lagged"])
def test_checkpoints_are_plain_and_resume_exactly(method, tmp_path):
    whole = Classifier(optimizer=adam)
    fitted = trainer(Seeded(), callback(method), max_epochs=2)
    fitted.fit(whole, loader())

    half = Classifier(optimizer=adam)
    first = trainer(Seeded(), callback(method), folder=tmp_path)
    first.fit(half, loader())
    path = first.checkpoint_callback.best_model_path
    written = torch.load(path, weights_only=True)
    assert set(written["state_dict"]) == set(Classifier().state_dict())
    assert len(written["entprop_auxiliary"]) == 7
    assert same(Classifier.load_from_checkpoint(path).state_dict(), half.state_dict())
    rest = Classifier(optimizer=adam)
    second = trainer(Seeded(), callback(method), max_epochs=2)
    second.fit(rest, loader(), ckpt_path=path)
    assert all(map(same, states(rest, second), states(whole, fitted)))
    assert lagged_state(rest) == lagged_state(rest.model) == {}  # nothing waits for another fit
    first.test(half, loader(8), ckpt_path=path, verbose=False)


def test_what_is_saved_after_fit_is_plain_and_is_not_resumed_from(tmp_path):
    fitted = trainer(callback())
    fitted.fit(Classifier(), loader(8))
    fitted.save_checkpoint(tmp_path / "after.ckpt")
    assert "entprop_auxiliary" not in torch.load(tmp_path / "after.ckpt", weights_only=True)
    with pytest.raises(entprop.errors.CheckpointError, match="or after fit"):
        trainer(callback(), max_epochs=2).fit(Classifier(), loader(8), ckpt_path=tmp_path / "after.ckpt")


def test_a_model_wrapped_by_the_user_stays_wrapped():
    module = Classifier(entprop.wrap(net(), exclude=nn.LayerNorm))
    trainer(callback()).fit(module, loader())
    assert is_wrapped(module)
    assert set(entprop.unwrap(module).state_dict()) == set(Classifier().state_dict())


def test_an_interrupted_fit_leaves_a_plain_module():
    class Broken(Classifier):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            raise RuntimeError("power cut")

    module = Broken()
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(callback()).fit(module, loader())
    assert not is_wrapped(module)
    assert type(module) is Broken


def test_a_module_that_is_copied_while_it_is_fitted_is_on_its_own(tmp_path):
    class Keep(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.best = copy.deepcopy(pl_module)
            torch.save(pl_module, tmp_path / "module.pt")

    keep, module = Keep(), Classifier()
    trainer(callback(), keep).fit(module, loader())
    for kept in (keep.best, torch.load(tmp_path / "module.pt", weights_only=False)):
        assert type(kept) is Classifier
        trained = entprop.unwrap(kept).state_dict()
        assert all(torch.equal(value, trained[name]) for name, value in module.state_dict().items())
        trainer().fit(kept, loader())


# Two processes --------------------------------------------------------------------------------------------------------


SETTINGS = ((1, "ddp"), (2, "ddp_find_unused_parameters_true"))


def fit_in_a_process(rank):
    results = []
    for accumulate, strategy in SETTINGS:
        torch.manual_seed(rank)
        mixer, module = RecordingMixer(), Classifier(lr=0.0)
        trainer(
            callback(EntProp(0.5, mix=mixer)),
            strategy=strategy,
            devices=2,
            accumulate_grad_batches=accumulate,
            use_distributed_sampler=False,
        ).fit(module, Batches(list(loader())[rank::2]))
        results.append((module.gradients, mixer.draws))
    return results


def test_two_processes_average_gradients():
    found = run_processes(fit_in_a_process)
    for case, (accumulate, _) in enumerate(SETTINGS):
        (first, draws), (second, other_draws) = (results[case] for results in found)
        alone = [
            by_hand(net(), list(loader())[rank::2], accumulate=accumulate, lr=0.0, draws=mine)[0]
            for rank, mine in enumerate((draws, other_draws))
        ]
        mean = [{name: (a[name] + b[name]) / 2 for name in a} for a, b in zip(*alone, strict=True)]
        assert worst(first, mean) < 1e-5
        assert worst(first, second) == 0


# Traps ----------------------------------------------------------------------------------------------------------------


def steps(step, **attributes):
    """A module with this training step, and with other nets beside its model."""

    class Own(Classifier):
        def __init__(self):
            super().__init__()
            for name, value in attributes.items():
                setattr(self, name, value())

        def training_step(self, batch, batch_idx):
            return step(self, *batch)

    return Own


Smoothed = steps(lambda self, x, y: F.cross_entropy(self.model(x), y, label_smoothing=0.1))
Brighter = steps(lambda self, x, y: F.cross_entropy(self.model(x * 1.01), y))
Twice = steps(lambda self, x, y: F.cross_entropy(self.model(x), y) + 0 * self.model(x).sum())
Skips = steps(lambda self, x, y: (self.model(x), None)[1])
Elsewhere = steps(lambda self, x, y: F.cross_entropy(self.net(x), y), net=net)
Nameless = steps(lambda self, x, y: F.cross_entropy(self.net(x), y), net=net, model=lambda: None)
Manual = steps(None, automatic_optimization=lambda: False)


class AnotherStrategy(DDPStrategy):
    """As DeepSpeed's and FSDP's are: derived from another, and not to be taken for it."""


class WithIterator(Classifier):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter)[0], 0)


class AsksForImages(Classifier):
    def criterion(self, logits, labels, images):
        return F.cross_entropy(logits, labels)


UNSUPPORTED, CONFIGURATION = entprop.errors.UnsupportedModelError, entprop.errors.ConfigurationError
TRAPS = [  # the module, options of the callback and of the Trainer
    (Smoothed, {}, {}, "cross_entropy is .*loss=", UNSUPPORTED),
    (Brighter, {}, {}, "other images than the batch", UNSUPPORTED),
    (Twice, {}, {}, "called 'model' 2 times", UNSUPPORTED),
    (Skips, {}, {}, "returned None", UNSUPPORTED),
    (Elsewhere, {}, {}, "called 'model' 0 times", UNSUPPORTED),
    (Manual, {}, {}, "manual_backward", UNSUPPORTED),
    (Nameless, {}, {}, "its parts are .*'net'", CONFIGURATION),
    (Classifier, {"model": "nut"}, {}, "no 'nut'", CONFIGURATION),
    (lambda: Classifier(optimizer=torch.optim.LBFGS), {}, {}, "LBFGS", UNSUPPORTED),
    (lambda: torch.compile(Classifier(), backend="eager"), {}, {}, r"self\.model = torch\.compile", UNSUPPORTED),
    (Classifier, {}, {"strategy": AnotherStrategy()}, "does not work with AnotherStrategy", UNSUPPORTED),
    (Classifier, {}, {"strategy": DDPStrategy(static_graph=True)}, "DDPStrategy with a static graph", UNSUPPORTED),
    (Classifier, {}, {"strategy": "ddp", "sync_batchnorm": True}, "convert_sync_batchnorm", UNSUPPORTED),
    (WithIterator, {}, {}, r"dataloader_iter\. Write training_step\(batch, batch_idx\)", UNSUPPORTED),
    (AsksForImages, {}, {}, r"asks for images beside logits and labels.*loss=", CONFIGURATION),
]


@pytest.mark.parametrize(("make", "options", "training", "match", "error"), TRAPS)
def test_traps_raise(make, options, training, match, error):
    with pytest.raises(error, match=match):
        trainer(callback(**options), **training).fit(make(), loader())


def test_what_was_a_trap_works_when_said():
    assert_as_by_hand(Smoothed(), net(), loss=nn.CrossEntropyLoss(label_smoothing=0.1), smoothing=0.1)
    trainer(callback(model="net")).fit(Nameless(), loader())
    trainer(callback(model="net")).fit(Elsewhere(), loader())


def test_batches_that_are_not_pairs_raise():
    x, y = images(4)
    for batch in ((x, y, torch.arange(4)), {"image": x, "label": y, "index": torch.arange(4)}, x):
        with pytest.raises(entprop.errors.DataError, match=r"\(images, labels\)|leave out tensors"):
            trainer(callback()).fit(Classifier(), Batches([batch]))


def test_a_checkpoint_without_copies_is_refused(tmp_path):
    fitted = trainer(folder=tmp_path)
    fitted.fit(Classifier(), loader())
    with pytest.raises(entprop.errors.CheckpointError, match="without EntPropLightningCallback"):
        trainer(callback(), max_epochs=2).fit(
            Classifier(), loader(), ckpt_path=fitted.checkpoint_callback.best_model_path
        )


def test_what_is_refused_of_callbacks():
    with pytest.raises(CONFIGURATION, match=r"pixel_space must be .*found 'imagenet'"):
        EntPropLightningCallback(pixel_space="imagenet")
    with pytest.raises(CONFIGURATION, match="two EntPropLightningCallbacks"):
        trainer(callback(), callback()).fit(Classifier(), loader())
