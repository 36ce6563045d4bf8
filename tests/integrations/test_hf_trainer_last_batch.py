"""A last training batch that is too small is left out, with a warning; everything else stays as it was."""

import warnings

import pytest
import torch
from torch.utils.data import IterableDataset

from entprop_wrap import EntProp
from entprop_wrap.errors import ImageError
from entprop_wrap.methods import FastAdvProp, Vanilla
from tests.integrations.hf_trainer_reference import (
    METHOD,
    OLD,
    RecordBatches,
    build,
    by_hand,
    callback,
    make_trainer,
    samples,
    train,
    worst,
)

LEFT_OUT = "leave a last batch of"


def make(folder, number, method=METHOD, data=None, **options):
    return make_trainer(
        folder,
        model="ResNet",
        data=samples(number) if data is None else data,
        eval_dataset=samples(9),
        data_collator=RecordBatches(),
        callbacks=[callback(method)],
        compute_metrics=lambda prediction: {"images": len(prediction.label_ids)},
        **options,
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_only_the_train_batch_of_one_is_left_out(accumulate, tmp_path):
    options = {"num_train_epochs": 2, "gradient_accumulation_steps": accumulate, "lr_scheduler_type": "linear"}
    options["per_device_eval_batch_size"] = 4  # a last evaluation batch of one, too
    trainer = make(tmp_path, 13, **options)
    message = "13 training images in batches of 4 leave a last batch of 1.* has 3 batches"
    with pytest.warns(UserWarning, match=message) as w:
        trainer.train()
    assert len([x for x in w if LEFT_OUT in str(x.message)]) == 1
    assert [len(b["labels"]) for b in trainer.data_collator.batches] == [4] * 6
    steps = 2 * -(-3 // accumulate)
    assert trainer.state.global_step == trainer.state.max_steps == steps
    assert set(trainer.lr_scheduler.get_last_lr()) == {0.0}  # the schedule ended with the run
    assert trainer.evaluate()["eval_images"] == 9


def test_the_gradients_are_those_of_the_batches_that_are_left(tmp_path):
    with pytest.warns(UserWarning, match=LEFT_OUT):
        _, batches, found = train(
            build("ViT"), callback(), tmp_path, data=samples(13), gradient_accumulation_steps=2, num_train_epochs=2
        )
    expected, _, _ = by_hand("ViT", build("ViT"), batches[:3], 2)
    assert len(batches) == 6
    assert worst(found[:2], expected) < 5e-4


@pytest.mark.filterwarnings("ignore:13 training images")
def test_resuming_is_bit_for_bit(tmp_path):
    options = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "optim": "adamw_torch"}
    options.update(save_strategy="steps", save_steps=1)
    whole = make(tmp_path / "whole", 13, EntProp(fraction=0.5), **options)
    whole.train()
    # In a second epoch transformers 4 shuffles anew when it resumes, with or without us.
    steps = range(1, whole.state.max_steps // (2 if OLD else 1) + 1)
    for step in steps[: whole.state.max_steps - 1]:
        again = make(tmp_path / "again", 13, EntProp(fraction=0.5), **{**options, "save_strategy": "no"})
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert again.state.global_step == whole.state.max_steps
        torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("number", "method", "options", "sizes"),
    [
        (12, METHOD, {}, [4, 4, 4]),
        (14, METHOD, {}, [4, 4, 4, 2]),
        (13, METHOD, {"dataloader_drop_last": True}, [4, 4, 4]),
        (14, FastAdvProp(fraction=0.5), {"per_device_train_batch_size": 8}, [8, 6]),
    ],
)
def test_other_rests_are_trained_on_without_a_word(number, method, options, sizes, tmp_path):
    trainer = make(tmp_path, number, method, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{LEFT_OUT}")
        trainer.train()
    assert [len(b["labels"]) for b in trainer.data_collator.batches] == sizes


@pytest.mark.parametrize(
    ("number", "method", "rest"),
    [(11, FastAdvProp(fraction=0.5), 3), (9, Vanilla(), 1)],
    ids=["FastAdvProp", "Vanilla"],
)
def test_what_is_left_out_depends_on_the_method(number, method, rest, tmp_path):
    trainer = make(tmp_path, number, method)
    with pytest.warns(UserWarning, match=f"a last batch of {rest}, too small for {type(method).__name__}"):
        trainer.train()
    assert [len(b["labels"]) for b in trainer.data_collator.batches] == [4, 4]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(samples(5))


@pytest.mark.parametrize(
    ("data", "options"),
    [(Stream(), {"max_steps": 2}), (None, {"per_device_train_batch_size": 1}), (samples(1), {})],
    ids=["stream", "batches of one", "one image"],
)
def test_what_is_left_to_the_user_says_what_the_option_costs(data, options, tmp_path):
    trainer = make(tmp_path, 5, data=data, **options)
    with pytest.raises(
        ImageError, match=r"TrainingArguments\(dataloader_drop_last=True\), which leaves out evaluation"
    ):
        trainer.train()
