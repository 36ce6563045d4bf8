"""Ways to use the callback that could go wrong: they work, or say what to write instead."""

import functools

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainerCallback, ViTImageProcessor
from transformers.modeling_outputs import ImageClassifierOutput

from entprop_wrap import EntProp, training_step, unwrap, wrap
from entprop_wrap.errors import ConfigurationError, LabelError, OptimizerMismatchError, UnsupportedModelError
from entprop_wrap.integrations.hf_trainer import EntPropCallback
from entprop_wrap.methods import Vanilla
from tests.helpers.every_method import METHODS, named
from tests.integrations.by_hand import pixels
from tests.integrations.hf_trainer_reference import (
    METHOD,
    SPACE,
    RecordBatches,
    RecordGradients,
    RecordingMixer,
    averaged,
    build,
    by_hand,
    callback,
    make_trainer,
    samples,
    train,
    with_compute_loss,
    worst,
)

make = functools.partial(make_trainer, max_steps=2)


def test_the_processing_class_says_how_images_are_normalised(tmp_path):
    processor = ViTImageProcessor(image_mean=list(SPACE.mean), image_std=list(SPACE.std))
    added = EntPropCallback(METHOD)
    make(tmp_path, callbacks=[added], processing_class=processor)
    torch.testing.assert_close(torch.tensor(added.space.mean), torch.tensor(SPACE.mean))
    torch.testing.assert_close(torch.tensor(added.space.std), torch.tensor(SPACE.std))
    make(tmp_path, callbacks=[EntPropCallback], processing_class=processor).train()


def test_without_a_pixel_space_there_is_an_error_at_once(tmp_path):
    model = build("ViT")
    with pytest.raises(ConfigurationError, match="processing_class"):
        make(tmp_path, model=model, callbacks=[EntPropCallback(METHOD)])
    wrap(model)  # it was left alone


def test_model_init_models_are_wrapped_each_time(tmp_path):
    recorded = RecordGradients()
    trainer = make(tmp_path, model_init=lambda: build("ResNet"), callbacks=[callback(), recorded])
    trainer.train()
    trainer.train()
    assert len(recorded.steps) == 4
    assert all(any("entprop_aux" in name for name in step) for step in recorded.steps)


def test_an_optimizer_built_too_early_is_refused(tmp_path):
    model = build("ViT")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(OptimizerMismatchError, match="wrap"):
        make(tmp_path, model=model, optimizers=(optimizer, None), callbacks=[callback()])
    wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make(tmp_path, model=model, optimizers=(optimizer, None), callbacks=[callback()]).train()


def test_a_callback_added_late(tmp_path):
    trainer = make(tmp_path)
    trainer.add_callback(callback())
    with pytest.raises(ConfigurationError, match="set_trainer"):
        trainer.train()
    trainer = make(tmp_path)
    late, recorded = callback(), RecordGradients()
    trainer.add_callback(late)
    trainer.add_callback(recorded)
    late.set_trainer(trainer)
    trainer.train()
    assert any("entprop_aux" in name for name in recorded.steps[0])


def test_a_batch_without_labels_or_with_other_tensors(tmp_path):
    no_labels = [{"pixel_values": sample["pixel_values"]} for sample in samples()]
    with pytest.raises(ConfigurationError, match="no 'labels'"):
        make(tmp_path, data=no_labels, callbacks=[callback()]).train()
    masks = [{**sample, "bool_masked_pos": torch.ones(4)} for sample in samples()]
    with pytest.raises(ConfigurationError, match="bool_masked_pos"):
        make(tmp_path, model="Beit", data=masks, callbacks=[callback()], remove_unused_columns=False).train()


@pytest.mark.parametrize("name", ["ResNet", "ViT", "Swin", "ConvNext"])
def test_copies_decay_like_the_norms_they_copy(name, tmp_path):
    trainer = make(tmp_path, model=name, callbacks=[callback()], weight_decay=0.1, optim="adamw_torch")
    trainer.create_optimizer()
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    parameters = dict(trainer.model.named_parameters())
    copies = [key for key in parameters if "entprop_aux" in key]
    assert copies
    assert all(decay[id(parameters[k])] == decay[id(parameters[k.replace("entprop_aux.", "")])] for k in copies)


def test_logs_carry_both_losses_and_entropies(tmp_path):
    trainer = make(tmp_path, callbacks=[callback()])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert 0 < log["aux_entropy"] < 2
        assert 0 < log["main_entropy"] < 2
        assert log["loss"] == pytest.approx(log["main_loss"] + 0.5 * log["aux_loss"], abs=2e-4)


def weighted(trainer, model, inputs):
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    return F.cross_entropy(outputs.logits, labels, weight=torch.arange(1.0, model.config.num_labels + 1)), outputs


def test_an_own_compute_loss_on_logits_works(tmp_path):
    weights = torch.arange(1.0, 6.0)
    options = {"trainer_class": with_compute_loss(weighted), "max_steps": 1}
    _, (batch, *_), found = train(build("ViT"), callback(), tmp_path, **options)
    model = wrap(build("ViT"))
    F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"], weight=weights).backward()
    main = model.classifier.weight.grad
    _, _, vanilla = train(build("ViT"), callback(Vanilla()), tmp_path, **options)
    torch.testing.assert_close(vanilla[0]["classifier.weight"], main)
    assert not torch.allclose(found[0]["classifier.weight"], main)


REACHES = {
    "parameters": lambda trainer, model: model.parameters(),
    "named_parameters": lambda trainer, model: [p for _, p in model.named_parameters()],
    "modules": lambda trainer, model: [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)],
    "state_dict": lambda trainer, model: [model.state_dict(keep_vars=True)["classifier.weight"]],
    "unwrap_model": lambda trainer, model: trainer.accelerator.unwrap_model(model).parameters(),
    "its model": lambda trainer, model: trainer.model.parameters(),
}


@pytest.mark.parametrize("reach", REACHES)
def test_a_penalty_on_weights_is_refused(reach, tmp_path):
    def penalised(trainer, model, inputs):
        outputs = model(**inputs)
        return outputs.loss + sum(p.square().sum() for p in REACHES[reach](trainer, model)), outputs

    with pytest.raises(UnsupportedModelError, match="adds a term of the model's weights"):
        make(tmp_path, with_compute_loss(penalised), callbacks=[callback()]).train()


def test_a_model_unwrapped_after_training_needs_a_new_trainer(tmp_path):
    trainer = make(tmp_path, callbacks=[callback()], max_steps=1)
    trainer.train()
    unwrap(trainer.model)
    with pytest.raises(ConfigurationError, match=r"was unwrapped after this Trainer was built.*Build a new Trainer"):
        trainer.train()


def test_a_run_after_one_that_was_interrupted_begins_without_its_images(tmp_path):
    class Interrupted(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    method = EntProp(fraction=0.5, lagged=True)
    trainer = make(tmp_path, callbacks=[callback(method), Interrupted()], max_steps=1)
    training_step(trainer.model, *pixels(4), method=method, pixel_space=SPACE)  # a step of one's own leaves some, too
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert "aux_loss" not in trainer.entprop.steps[-1]  # nothing waited for the first step


@pytest.mark.parametrize(
    "compute",
    [
        lambda trainer, model, inputs: (model(**inputs, output_hidden_states=True).hidden_states[-1].mean(), None),
        lambda trainer, model, inputs: (trainer.model(**inputs).loss, None),
    ],
    ids=["features", "another model"],
)
def test_a_compute_loss_of_anything_else_is_refused(compute, tmp_path):
    with pytest.raises(UnsupportedModelError, match="compute_loss"):
        make(tmp_path, with_compute_loss(compute), callbacks=[callback()]).train()


OTHER_LOSSES = {
    "smoothed": lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
    "with entropy": lambda x, y: F.cross_entropy(x, y) + 0.1 * (x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
    "weighted": lambda x, y: F.cross_entropy(x, y, weight=torch.arange(1.0, 6.0), reduction="sum") / len(y),
    "summed": lambda x, y: F.cross_entropy(x, y, reduction="sum"),
}


def with_loss(name, loss, items=False):
    """A model that computes a loss of its own, with or without num_items_in_batch."""
    model = build(name)

    def output(self, pixel_values, labels, **kwargs):
        logits = super(Own, self).forward(pixel_values).logits
        return ImageClassifierOutput(None if labels is None else loss(logits, labels, **kwargs), logits)

    class Own(type(model)):
        if items:

            def forward(self, pixel_values, labels=None, **kwargs):
                return output(self, pixel_values, labels, **kwargs)
        else:

            def forward(self, pixel_values, labels=None):
                return output(self, pixel_values, labels)

    model.__class__ = Own
    return model


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_a_model_with_another_loss_is_refused(name, tmp_path):
    loss = OTHER_LOSSES[name]
    with pytest.raises(UnsupportedModelError, match=r"another loss cannot be computed.*compute_loss_func"):
        make(tmp_path, model=with_loss("ResNet", loss), callbacks=[callback()]).train()
    if name == "smoothed":
        make(tmp_path, model=with_loss("ResNet", loss), callbacks=[callback()], compute_loss_func=averaged).train()


def by_items(logits, labels, num_items_in_batch=None, **_):
    total = F.cross_entropy(logits, labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def ignoring_items(logits, labels, **_):
    return F.cross_entropy(logits, labels)


@pytest.mark.parametrize("loss", [by_items, ignoring_items])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_way_a_model_divides_its_loss_is_seen(loss, accumulate, tmp_path):
    """22 images in batches of 4, in groups of 4 and 2 batches, or one by one: Vanilla is what the Trainer does."""
    results = []
    for added in (None, callback(Vanilla())):
        model = with_loss("ResNet", loss, items=True)
        results.append(train(model, added, tmp_path, gradient_accumulation_steps=accumulate)[2])
    assert worst(*results) < 1e-5


def test_the_way_a_model_divides_is_looked_for_until_it_shows(tmp_path):
    """The first group holds one batch, of all items: there both ways are the same."""
    results = []
    for added in (None, callback(Vanilla())):
        trainer = make(
            tmp_path,
            model=with_loss("ResNet", by_items, items=True),
            callbacks=[*([added] if added else []), gradients := RecordGradients()],
            gradient_accumulation_steps=2,
            max_steps=3,
        )
        items = trainer._get_num_items_in_batch
        given = iter([4, 8, 8])
        trainer._get_num_items_in_batch = lambda *args, given=given, items=items: items(*args) * 0 + next(given)
        trainer.train()
        results.append(gradients.steps)
    assert worst(*results) < 1e-5


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        *(
            (name, lambda y: y + 1, LabelError, r"in \[0, 4\] .* found \[\d, 5\].*start at 0")
            for name in ("ViT", "ResNet")
        ),
        ("ViT", lambda y: torch.full((5,), 0.2), LabelError, "compute_loss_func"),
        ("ViT", lambda y: torch.tensor(y, dtype=torch.int32), UnsupportedModelError, r"int32 labels .*to be int64"),
    ],
    ids=["from 1, ViT", "from 1, ResNet", "soft", "int32"],
)
def test_labels_that_cannot_serve_are_told_as_in_any_loop(name, change, error, message, tmp_path):
    data = [{**sample, "labels": change(sample["labels"])} for sample in samples()]
    with pytest.raises(error, match=message):
        make(tmp_path, model=name, data=data, callbacks=[callback()], per_device_train_batch_size=8).train()


def test_soft_labels_train_with_a_loss_for_them(tmp_path):
    soft = [{**sample, "labels": torch.full((5,), 0.2)} for sample in samples()]
    make(tmp_path, data=soft, callbacks=[callback()], compute_loss_func=averaged).train()


@pytest.mark.parametrize(("name", "accumulate"), [("ResNet", 1), ("ConvNext", 2)])
@pytest.mark.parametrize("method", [*METHODS, EntProp(fraction=0.5, lagged=True)], ids=named)
def test_every_method_trains_as_in_a_loop_of_its_own(method, name, accumulate, tmp_path):
    """One step, where the Trainer's loss is the mean of plain cross-entropy over the batches of the step."""
    torch.manual_seed(5)
    draws = torch.get_rng_state()
    collator, gradients = RecordBatches(), RecordGradients()
    options = {"max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": accumulate}
    callbacks = [callback(method), gradients]
    trainer = make(tmp_path, model=name, data_collator=collator, callbacks=callbacks, **options)
    seen = []
    original = trainer._prepare_inputs

    def prepare(inputs):  # the same random numbers in both steps
        if not any(inputs["labels"] is labels for labels in seen):
            seen.append(inputs["labels"])
            torch.set_rng_state(draws)
        return original(inputs)

    trainer._prepare_inputs = prepare
    trainer.train()
    assert len(seen) == accumulate
    model = build(name).train()
    if method.auxiliaries:
        wrap(model, auxiliaries=method.auxiliaries)
    for batch in collator.batches[:accumulate]:
        torch.set_rng_state(draws)
        training_step(model, batch["pixel_values"], batch["labels"], method=method, pixel_space=SPACE)
    expected = {n: p.grad / accumulate for n, p in model.named_parameters() if p.grad is not None}
    assert worst(gradients.steps, [expected]) < 5e-4


def test_the_loss_of_a_model_without_opinions_is_looked_at_in_lagged_passes_too(tmp_path):
    model = build("ViT")
    torch.nn.init.zeros_(model.classifier.weight)
    lagged = callback(EntProp(fraction=0.5, lagged=True))
    trainer, _, _ = train(model, lagged, tmp_path, max_steps=2, learning_rate=0.0)
    assert trainer.state.log_history[1]["aux_loss"] > 0


def test_more_attack_steps_under_checkpointing(tmp_path):
    def trainer(reentrant):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        return make(tmp_path, callbacks=[callback(EntProp(fraction=0.5, attack_steps=2))], **options)

    trainer(False).train()
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        trainer(True).train()


@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_a_gradient_scaler_leaves_no_trace(clip, tmp_path):
    """The path of fp16, on the CPU and in float32: the scaler scales, unscales and steps as on a GPU."""
    collator, gradients, mixer = RecordBatches(), RecordGradients(), RecordingMixer()

    class Scaled(Trainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            self.accelerator.scaler = scaler
            self.accelerator.unscale_gradients = lambda *_: scaler.unscale_(self.optimizer.optimizer)
            return optimizer

    callbacks = [callback(EntProp(fraction=0.5, mix=mixer)), gradients]
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": clip}
    trainer = make_trainer(tmp_path, Scaled, data_collator=collator, callbacks=callbacks, **options)
    trainer.train()
    expected, _, _ = by_hand("ViT", build("ViT"), collator.batches, 2, clip=clip, draws=mixer.draws)
    assert trainer.accelerator.scaler.get_scale() == 1024
    assert worst(gradients.steps, expected) < 5e-4


@pytest.mark.parametrize("found", ["DeepSpeed", "FSDP", "DataParallel over several GPUs"])
def test_what_cannot_be_right_is_refused_before_the_model_is_wrapped(found, tmp_path):
    attribute = {"DeepSpeed": "is_deepspeed_enabled", "FSDP": "is_fsdp_enabled"}.get(found)

    class Launched(Trainer):
        """As it is where its processes, or several GPUs, are there."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            if attribute:
                setattr(self, attribute, True)
            self.args._n_gpu = 1 if attribute else 2

    model = build("ViT")
    with pytest.raises(UnsupportedModelError, match=rf"does not work with {found}\. Expected .*DDP"):
        make(tmp_path, trainer_class=Launched, model=model, callbacks=[callback()])
    wrap(model)  # it was left alone


def test_arguments_of_the_wrong_kind_are_refused_at_once():
    with pytest.raises(TypeError, match="EntProp"):
        EntPropCallback(EntProp)
    with pytest.raises(ConfigurationError, match="pixel_space must be a PixelSpace or None, found 'imagenet'"):
        EntPropCallback(pixel_space="imagenet")


def test_one_callback_for_one_trainer(tmp_path):
    with pytest.raises(ConfigurationError, match="two EntPropCallbacks"):
        make(tmp_path, callbacks=[callback(), callback()])
    shared = callback()
    first, second = (make(tmp_path, callbacks=[shared]) for _ in range(2))
    with pytest.raises(ConfigurationError, match="another Trainer"):
        first.train()
    second.train()
