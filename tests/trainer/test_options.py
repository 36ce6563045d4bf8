"""Real runs on small data: what each option does."""

import copy
import json
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import DistributedType
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import entprop_wrap as entprop
from entprop_wrap import EntProp, Trainer, TrainerConfig
from entprop_wrap.errors import (
    AuxiliaryNameError,
    ConfigurationError,
    DataError,
    DivergedError,
    ImageError,
    LabelError,
    NoNormLayersError,
    OptimizerMismatchError,
    PixelRangeError,
    UnsupportedModelError,
)
from entprop_wrap.methods import Vanilla
from tests.faults.accidents import lines
from tests.helpers import trainers
from tests.helpers.trainer_toys import CLASSES, BatchNormNet, GroupNormNet, Images, make

pytestmark = pytest.mark.filterwarnings("ignore:Only . images a step")  # batches are small here


def trainer(folder, *args, **options):
    return trainers.trainer(folder, *args, **{"learning_rate": 1e-2, "log_every": 1, **options})


def types_of(layer):
    """Return a list that the types of the layer's outputs are noted in."""
    types = []
    layer.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    return types


def test_a_run_learns_and_writes_everything(tmp_path):
    run = trainer(tmp_path, epochs=6, method=EntProp(fraction=0.4, attack_steps=2))
    plain = list(make(BatchNormNet).state_dict())
    result = run.fit()
    assert result["accuracy"] > 0.9
    assert result == run.position.evaluation
    assert result == run.evaluate()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "metrics.jsonl", "model"]
    train, evaluated = lines(tmp_path, "train"), lines(tmp_path, "eval")
    assert [line["step"] for line in train] == list(range(1, 25))
    assert [line["epoch"] for line in evaluated] == [1, 2, 3, 4, 5, 6]
    keys = "kind step epoch loss main_loss aux_loss main_entropy aux_entropy passes learning_rate images_per_second"
    assert json.loads((tmp_path / "metrics.jsonl").open().readline()).keys() == set(keys.split())
    assert all(line["passes"] == pytest.approx(1.8) for line in train)
    assert train[0]["loss"] == pytest.approx(train[0]["main_loss"] + 0.4 * train[0]["aux_loss"], rel=1e-5)
    assert evaluated[0].keys() == {"kind", "step", "epoch", "loss", "accuracy", "mean_class_accuracy", "weights"}
    model = entprop.unwrap(run.model)
    assert list(model.state_dict()) == plain
    assert model.__dict__.keys() == make(BatchNormNet).__dict__.keys()  # no trace of Accelerate


@pytest.mark.parametrize("lagged", [False, True])
def test_log_lines_average_their_steps(tmp_path, lagged):
    method = entprop.EntProp(lagged=lagged)
    trainer(tmp_path / "each", epochs=1, method=method).fit()
    trainer(tmp_path / "pairs", epochs=1, log_every=2, method=method).fit()
    each, pairs = lines(tmp_path / "each", "train"), lines(tmp_path / "pairs", "train")
    assert [line["step"] for line in pairs] == [2, 4]
    for key in ("loss", "main_loss", "aux_loss", "main_entropy", "aux_entropy"):
        assert pairs[1][key] == pytest.approx((each[2][key] + each[3][key]) / 2, rel=1e-5)
    assert pairs[1]["learning_rate"] == each[3]["learning_rate"]
    first = [line["aux_loss"] for line in each[:2] if "aux_loss" in line]  # the first lagged step has none
    assert len(first) == 2 - lagged
    assert pairs[0]["aux_loss"] == pytest.approx(sum(first) / len(first), rel=1e-5)


@pytest.mark.parametrize("norm", [None, 0.2])  # clipping hides the scale
def test_the_last_group_of_batches_counts_by_its_size(tmp_path, norm):
    """Against a loop written out: 5 batches in groups of 2, 2 and 1; clipped; decayed where it should be."""
    model = make(GroupNormNet)
    reference = copy.deepcopy(model)
    options = {"optimizer": "sgd", "learning_rate": 0.3, "weight_decay": 0.1, "schedule": "linear", "warmup": 0.34}
    options |= {"gradient_accumulation_steps": 2, "max_grad_norm": norm}
    run = trainer(tmp_path, model, Images(50), method=Vanilla(), epochs=1, **options)
    batches = list(run.train_batches.epoch(0))
    run.fit()
    decayed = [reference.conv.weight, reference.fc.weight]
    others = [p for p in reference.parameters() if all(p is not d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.3, momentum=0.9)
    for group, factor in (([0, 1], 0.5), ([2, 3], 1.0), ([4], 0.5)):
        for index in group:
            images, labels = batches[index]
            (cross_entropy(reference(images), labels) / len(group)).backward()
        if norm is not None:
            assert torch.nn.utils.clip_grad_norm_(reference.parameters(), norm) > norm
        for parameters in optimizer.param_groups:
            parameters["lr"] = 0.3 * factor
        optimizer.step()
        optimizer.zero_grad()
    for found, expected in zip(run.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    assert [line["learning_rate"] for line in lines(tmp_path, "train")] == pytest.approx([0.15, 0.3, 0.15])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("step", [1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("cosine", [1, 0.933, 0.75, 0.5, 0.25, 0.067]),
        (
            lambda optimizer, steps: torch.optim.lr_scheduler.ExponentialLR(optimizer, 1 / steps),
            [6**-n for n in range(6)],
        ),
    ],
    ids=["constant", "linear", "step", "cosine", "function"],
)
def test_schedules(tmp_path, schedule, expected):
    trainer(tmp_path, make(GroupNormNet), Images(30), schedule=schedule, warmup=0.0, method=Vanilla()).fit()
    rates = [line["learning_rate"] / 1e-2 for line in lines(tmp_path, "train")]
    assert rates == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        (lambda groups: torch.optim.RMSprop(groups, lr=1e-2, momentum=0.5), torch.optim.RMSprop),
    ],
)
def test_optimizers(tmp_path, optimizer, kind):
    made = trainer(tmp_path, optimizer=optimizer, momentum=0.5)._state.prepared.optimizer.optimizer
    assert type(made) is kind
    assert made.defaults["lr"] == 1e-2
    assert made.defaults.get("momentum", 0.5) == 0.5


@pytest.mark.parametrize(
    ("options", "decay"),
    [
        ({}, 0.05),
        ({"optimizer": "sgd"}, 5e-4),
        ({"optimizer": "sgd", "weight_decay": 0.0}, 0.0),
        ({"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.3)}, 0.3),
        ({"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.3), "weight_decay": 0.2}, 0.2),
    ],
    ids=["adamw", "sgd", "none", "function", "both"],
)
def test_weight_decay(tmp_path, options, decay):
    groups = trainer(tmp_path, **options)._state.prepared.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [decay, 0.0]


@pytest.mark.parametrize("prepared", [False, True])
def test_a_given_optimizer_is_used(tmp_path, prepared):
    model = entprop.wrap(make(BatchNormNet))
    optimizer = torch.optim.SGD(entprop.parameter_groups(model, 0.0), lr=0.05)
    optimizer = Accelerator().prepare(optimizer) if prepared else optimizer
    run = trainer(tmp_path, model, ready=optimizer, epochs=1, schedule="constant", warmup=0.0)
    before = model.conv.weight.clone()
    run.fit()
    assert not torch.equal(before, model.conv.weight)
    assert lines(tmp_path, "train")[0]["learning_rate"] == 0.05


def test_gradients_of_what_the_optimizer_does_not_hold_are_not_summed_up(tmp_path):
    """Against a loop written out: they count where gradients are clipped, those of the same step alone."""
    model = make(GroupNormNet)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.1)
    options = {"schedule": "constant", "warmup": 0.0, "max_grad_norm": 0.2, "epochs": 1}
    run = trainer(tmp_path, model, method=Vanilla(), ready=optimizer, **options)
    batches = list(run.train_batches.epoch(0))
    run.fit()
    optimizer = torch.optim.SGD(reference.fc.parameters(), lr=0.1)
    for images, labels in batches:
        cross_entropy(reference(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.2)
        optimizer.step()
        reference.zero_grad()
    torch.testing.assert_close(model.fc.weight, reference.fc.weight)


def test_the_average_follows_its_formula(tmp_path):
    """decay * average + (1 - decay) * weights after each step, starting with the first."""
    seen = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            seen.append(run.model.conv.weight.detach().clone())

    model = entprop.wrap(make(BatchNormNet))
    optimizer = Recording(entprop.parameter_groups(model, 0.0), lr=0.5)
    run = trainer(tmp_path, model, ready=optimizer, epochs=1, ema_decay=0.7)
    result = run.fit()
    expected = seen[0]
    for weights in seen[1:]:
        expected = 0.7 * expected + 0.3 * weights
    average = run._state.average.module
    torch.testing.assert_close(average.conv.weight, expected)
    assert int(average.bn.num_batches_tracked) == int(model.bn.num_batches_tracked) == 4
    assert not torch.equal(average.bn.running_mean, model.bn.running_mean)
    assert lines(tmp_path, "eval")[0]["weights"] == "average"

    plain = trainer(tmp_path / "b", average.requires_grad_(True), method=Vanilla())
    assert plain.evaluate() == pytest.approx(result)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"mixed_precision": "bf16"}, 0.05),
        ({"mixed_precision": "bf16", "ema_decay": 0.5}, 0.05),
        ({"channels_last": True}, 0.05),
        ({"compile": True}, 1e-4),
    ],
    ids=str,
)
def test_options_that_change_the_numbers_a_little(tmp_path, options, tolerance, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the backend is not what is tested
    trainer(tmp_path / "plain", make(BatchNormNet, dropout=0.0)).fit()
    run = trainer(tmp_path / "option", make(BatchNormNet, dropout=0.0), **options)
    run.fit()
    plain, found = ([line["loss"] for line in lines(tmp_path / name, "train")] for name in ("plain", "option"))
    assert found == pytest.approx(plain, rel=tolerance)
    assert run.model.conv.weight.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in options)
    assert hasattr(run._state.prepared.model, "_orig_mod") == ("compile" in options)
    if "mixed_precision" in options:
        average = run._state.average
        types = types_of((run.model if average is None else average.module).fc)
        run.evaluate()
        assert set(types) == {torch.bfloat16}


def test_trainers_of_different_precision_in_one_process(tmp_path):
    precisions = {"a": "bf16", "b": "no", "c": None}  # also after an evaluation, in the second epoch
    made = [trainer(tmp_path / name, mixed_precision=kind) for name, kind in precisions.items()]
    for run, kind in zip(made, (torch.bfloat16, torch.float32, torch.float32), strict=True):
        types = types_of(run.model.fc)
        run.fit()
        run.evaluate()
        assert set(types) == {kind}


def test_the_same_model_again(tmp_path):
    model = make(BatchNormNet)
    trainer(tmp_path / "vanilla", model, method=Vanilla(), epochs=1, mixed_precision="bf16").fit()
    run = trainer(tmp_path / "entprop", model, epochs=1)
    types = types_of(model.fc)
    run.fit()
    assert set(types) == {torch.float32}


def test_keep_last_and_best(tmp_path):
    run = trainer(tmp_path, epochs=5, batch_size=20, keep_last=2)
    accuracies, evaluate = iter([0.3, 0.8, 0.5, 0.8, 0.1]), run.evaluate  # best after the second epoch
    run.evaluate = lambda: {**evaluate(), "accuracy": next(accuracies)}
    run.fit()
    names = [path.name for path in run.checkpoints.all()]
    assert names == ["step-00000004", "step-00000008", "step-00000010"]
    assert run.checkpoints.best().name == "step-00000004"
    assert run.position.best == {"accuracy": 0.8}


def test_a_new_best_is_saved_between_saves(tmp_path):
    run = trainer(tmp_path, epochs=4, save_every=3, keep_best="loss", keep_last=None)
    run.fit()
    losses = [line["loss"] for line in lines(tmp_path, "eval")]
    best = losses.index(min(losses)) + 1
    assert f"step-{4 * best:08d}" in [path.name for path in run.checkpoints.all()]
    assert run.checkpoints.best().name == f"step-{4 * best:08d}"


def test_evaluations_without_checkpoints(tmp_path):
    trainer(tmp_path, save_every=None, epochs=3, evaluate_every=2).fit()
    assert [line["epoch"] for line in lines(tmp_path, "eval")] == [2, 3]
    assert not (tmp_path / "checkpoints").exists()
    assert (tmp_path / "model").exists()


def test_evaluation_by_hand(tmp_path):
    model = make(BatchNormNet)
    data = Images(30)
    data.labels = torch.tensor([0] * 20 + [1] * 7 + [3] * 3)  # one class is missing
    run = trainer(tmp_path, model, eval_data=data, eval_batch_size=7, method=Vanilla())
    found = run.evaluate()
    assert model.training
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(data.images.clamp(0, 1))
    right = (logits.argmax(1) == data.labels).double()
    assert found["loss"] == pytest.approx(cross_entropy(logits, data.labels).item(), rel=1e-6)
    assert found["accuracy"] == pytest.approx(right.mean().item())
    by_class = [right[data.labels == label].mean().item() for label in (0, 1, 3)]
    assert found["mean_class_accuracy"] == pytest.approx(sum(by_class) / 3)
    assert run.evaluate(DataLoader(Images(6), 4)).keys() == found.keys()


def test_soft_labels(tmp_path):
    soft = [(image, 0.9 * torch.eye(CLASSES)[label] + 0.1 / CLASSES) for image, label in Images(seed=1)]
    run = trainer(tmp_path, epochs=1, data=soft)
    run.fit()
    assert run.evaluate(soft)["accuracy"] == run.evaluate()["accuracy"]


def test_a_loss_of_ones_own(tmp_path):
    calls = []

    def smooth(logits, labels):
        calls.append(len(logits))
        return cross_entropy(logits, labels, label_smoothing=0.1)

    trainer(tmp_path, epochs=1, loss=smooth, method=Vanilla(), data=DataLoader(Images(20), 5)).fit()
    assert calls[:5] == [5, 10, 5, 5, 5]  # and once every row twice, to see whether it is a mean


def test_trackers_get_what_the_file_gets_and_there_is_a_bar(tmp_path, capsys):
    class Memory(GeneralTracker):
        name, requires_logging_directory = "memory", False

        @on_main_process
        def __init__(self):
            super().__init__()
            self.configuration, self.logged, self.finished = {}, [], False

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            self.configuration = values

        def log(self, values, step, **options):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    tracker = Memory()
    trainer(tmp_path, epochs=1, log_with=tracker, progress=True).fit()
    assert "4/4" in capsys.readouterr().err
    assert tracker.configuration["batch_size"] == 10
    assert tracker.configuration["method"].startswith("EntProp(")
    assert [step for step, _ in tracker.logged] == [1, 2, 3, 4, 4]
    assert tracker.logged[0][1]["train/loss"] == lines(tmp_path, "train")[0]["loss"]
    assert "eval/accuracy" in tracker.logged[-1][1]
    assert tracker.finished


def test_a_diverging_run_stops(tmp_path):
    run = trainer(tmp_path, learning_rate=1e30, optimizer="sgd", max_grad_norm=None, schedule="constant", warmup=0.0)
    with pytest.raises(DivergedError, match=r"up to step \d+\. The last checkpoint: none"):
        run.fit()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    def loss(logits, labels):  # finite, with a gradient that is not
        return cross_entropy(logits, labels) + (0 * logits).sum().abs().sqrt()

    run = trainer(tmp_path, loss=loss, epochs=1, batch_size=40, method=Vanilla(), max_grad_norm=None)
    with pytest.raises(DivergedError, match="Did not save"):
        run.fit()
    assert run.checkpoints.all() == []


def test_running_statistics_that_are_not_finite_are_not_saved(tmp_path):
    run = trainer(tmp_path, make(BatchNormNet), epochs=1, batch_size=40, method=Vanilla())
    run.model.bn.running_var.fill_(torch.inf)  # with which logits are finite: the norm gives its bias
    with pytest.raises(DivergedError, match=r"Did not save: 1 of .* such as 'bn.running_var'"):
        run.fit()


def test_an_average_that_remembers_longer_than_the_run_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="ema_decay=0.999 in 8 steps: more than half of the averaged weights"):
        trainer(tmp_path, ema_decay=0.999)


def test_a_mask_of_infinities_is_neither_averaged_nor_taken_for_divergence(tmp_path):
    model = make(GroupNormNet)
    model.register_buffer("mask", torch.full((CLASSES, CLASSES), -torch.inf).triu(1))
    run = trainer(tmp_path, model, epochs=1, ema_decay=0.5)
    run.fit()
    assert torch.equal(run._state.average.module.mask, run.model.mask)


# What cannot be right is refused, before anything is written and with the model as it was.


def refused(error, message, folder, *args, **options):
    with pytest.raises(error, match=message):
        trainer(folder, *args, **options)
    assert not list(folder.iterdir())


def test_what_does_not_fit_leaves_no_trace(tmp_path):
    model = make(BatchNormNet)
    keys, optimizer = list(model.state_dict()), torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = lambda optimizer, steps: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)  # noqa: E731
    refused(DataError, "train_data is empty", tmp_path, model, Images(0))
    refused(DataError, "eval_data is empty", tmp_path, model, Images(), Images(0))
    refused(OptimizerMismatchError, "built before wrap", tmp_path, model, ready=optimizer)
    refused(TypeError, r"torch.optim.Optimizer, found 'sgd'.*optimizer='sgd'", tmp_path, model, ready="sgd")
    refused(TypeError, "torch.optim.Optimizer, found {}", tmp_path, model, optimizer=lambda groups: {})
    refused(ConfigurationError, "without a metric", tmp_path, model, schedule=plateau)
    assert list(model.state_dict()) == keys
    entprop.wrap(model)
    refused(OptimizerMismatchError, "built before wrap", tmp_path, model, ready=optimizer)


def test_an_optimizer_of_another_model(tmp_path):
    model = entprop.wrap(make(BatchNormNet))
    parameters = entprop.parameter_groups(copy.deepcopy(model), 0.0)
    message = "8 of the optimizer's 8 parameters are not the model's"
    refused(OptimizerMismatchError, message, tmp_path, model, ready=torch.optim.SGD(parameters, lr=0.1))
    refused(OptimizerMismatchError, message, tmp_path, model, optimizer=lambda _: torch.optim.SGD(parameters, lr=0.1))


def test_another_auxiliary(tmp_path):
    model = entprop.wrap(make(BatchNormNet), auxiliaries=("adv",))
    refused(AuxiliaryNameError, "'adv'", tmp_path, model)
    trainer(tmp_path, model, method=EntProp(auxiliary="adv"), epochs=1).fit()


def test_models_that_do_not_fit(tmp_path):
    refused(NoNormLayersError, "norm", tmp_path, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, CLASSES)))
    compiled = torch.compile(make(BatchNormNet), backend="eager")
    refused(UnsupportedModelError, "compile=True", tmp_path, compiled)
    frozen = make(BatchNormNet).requires_grad_(False)
    refused(ConfigurationError, "nothing to train", tmp_path, frozen)
    counting = make(BatchNormNet)
    counting.fc.__class__ = type("Counting", (torch.nn.Linear,), {"get_extra_state": lambda self: {"calls": 0}})
    refused(UnsupportedModelError, "'fc._extra_state' in .* Have get_extra_state", tmp_path, counting)
    refused(UnsupportedModelError, "expected a torch.nn.Module", tmp_path, "resnet18")
    refused(TypeError, r"method=EntProp\(\)", tmp_path, method=EntProp)


def test_images_of_another_form_are_refused_in_any_layout(tmp_path):
    grey = [(torch.rand(8, 8), 0)] * 20
    run = trainer(tmp_path, channels_last=True, data=grey, eval_data=grey)
    for use in (run.fit, run.evaluate):
        with pytest.raises(ImageError, match=r"\(N, C, H, W\)"):
            use()


def test_launcher_and_configuration_must_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    refused(ConfigurationError, "gradient_accumulation_steps=4", tmp_path)
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert trainer(tmp_path).accelerator.mixed_precision == "bf16"
    assert trainer(tmp_path, mixed_precision="no").accelerator.mixed_precision == "no"


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works there")
def test_fp16_on_the_cpu(tmp_path):
    refused(ConfigurationError, "write 'bf16' or 'no'", tmp_path, mixed_precision="fp16")


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_deepspeed_and_megatron_are_refused(tmp_path, monkeypatch, kind):
    class Launched(Accelerator):
        """As one of their processes has it; the packages themselves want a GPU."""

        def __init__(self, **options):
            super().__init__(**options)
            monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", kind)

    monkeypatch.setattr("entprop_wrap.trainer.accelerator.Accelerator", Launched)
    refused(UnsupportedModelError, f"{kind.value} steps inside backward.*Choose DDP or FSDP2", tmp_path)


@pytest.fixture
def fp16(monkeypatch):
    """Return a function that has Accelerate do on the CPU what it does on a GPU under fp16, with this first scale."""

    def use(scale):
        class Scaled(Accelerator):
            def __init__(self, **options):
                super().__init__(**options)
                monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
                self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)

        monkeypatch.setattr("entprop_wrap.trainer.accelerator.Accelerator", Scaled)

    return use


def test_fp16_scales_and_is_close_to_float32(tmp_path, fp16):
    options = {"epochs": 1, "optimizer": "sgd", "learning_rate": 0.3}  # with which a wrong scale shows
    trainer(tmp_path / "full", make(BatchNormNet, dropout=0.0), **options).fit()
    fp16(2.0**10)
    run = trainer(tmp_path / "half", make(BatchNormNet, dropout=0.0), **options)
    types = types_of(run.model.fc)
    run.fit()
    assert set(types) == {torch.float16}
    assert run.accelerator.scaler.get_scale() == 2.0**10
    full, half = ([line["loss"] for line in lines(tmp_path / name, "train")] for name in ("full", "half"))
    assert half == pytest.approx(full, rel=0.02)


def test_an_fp16_step_that_overflows_is_skipped_and_its_scale_is_resumed(tmp_path, fp16):
    fp16(2.0**100)  # far too much for the first step, and for the next
    run = trainer(tmp_path / "a", method=Vanilla(), epochs=1, ema_decay=0.5, save_every_steps=2, keep_last=None)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.fit()
    assert run.accelerator.scaler.get_scale() == 2.0**96
    assert all(map(torch.equal, before, run.model.parameters()))
    assert run._state.average.n_averaged == 0
    assert len({line["learning_rate"] for line in lines(tmp_path / "a", "train")}) == 1  # the schedule waits
    again = trainer(tmp_path / "b", method=Vanilla(), epochs=1, ema_decay=0.5, save_every_steps=2, keep_last=None)
    again.fit(resume=tmp_path / "a" / "checkpoints" / "step-00000002")
    assert again.accelerator.scaler.get_scale() == 2.0**96


def test_nothing_but_overflows_under_fp16_stops_the_run(tmp_path, fp16):
    fp16(2.0)
    run = trainer(tmp_path, loss=lambda logits, labels: float("inf") * cross_entropy(logits, labels), method=Vanilla())
    with pytest.raises(DivergedError, match=r"not finite in (\d+) of the \1 batches up to step"):
        run.fit()


def test_errors_of_the_step_come_through(tmp_path):
    bytes_ = [(255 * image, label) for image, label in Images()]
    with pytest.raises(PixelRangeError, match="divide by 255"):
        trainer(tmp_path, data=bytes_).fit()
    wrong = Images()
    wrong.labels = wrong.labels + 1
    with pytest.raises(LabelError, match="Class indices"):
        trainer(tmp_path, data=wrong).fit()
    with pytest.raises(LabelError, match="Class indices"):
        trainer(tmp_path).evaluate(wrong)
    with pytest.raises(DataError, match="No data to evaluate on"):
        Trainer(make(BatchNormNet), Images(), config=TrainerConfig(output_dir=tmp_path, batch_size=10)).evaluate()
