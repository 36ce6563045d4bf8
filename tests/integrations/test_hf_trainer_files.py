"""Files that the Trainer writes and reads with the callback."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from entprop_wrap import EntProp, auxiliary_state_dict, main_state_dict, unwrap
from entprop_wrap.errors import CheckpointError
from entprop_wrap.functional.attacks import PGD
from entprop_wrap.methods import AdvProp, FineGrainedAdvProp, Vanilla
from entprop_wrap.methods.lagged import lagged_state
from tests.integrations.hf_trainer_reference import (
    assert_plain,
    assert_same,
    best_of,
    build,
    callback,
    keys_in,
    make_trainer,
    record_states,
    samples,
    train,
)

FILE = "entprop_auxiliary.safetensors"
METHOD, LAGGED = EntProp(fraction=0.5), EntProp(fraction=0.5, lagged=True)
OPTIONS = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.mark.parametrize(("name", "method"), [("ResNet", METHOD), ("ViT", METHOD), ("ResNet", LAGGED)])
def test_checkpoints_are_plain_and_resume_is_bit_for_bit(name, method, tmp_path):
    whole, _, _ = train(build(name), callback(method), tmp_path / "whole", **OPTIONS)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    build(name).save_pretrained(tmp_path / "plain")
    assert keys_in(checkpoint / "model.safetensors") == keys_in(tmp_path / "plain" / "model.safetensors")
    assert_plain(checkpoint)

    trainer = make_trainer(
        tmp_path / "b", model=name, callbacks=[callback(method)], **{**OPTIONS, "save_strategy": "no"}
    )
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_same(trainer.model.state_dict(), whole.model.state_dict())
    assert lagged_state(trainer.model) == {}  # nothing waits for another run
    copies, main = auxiliary_state_dict(trainer.model), main_state_dict(trainer.model)
    assert any(not torch.equal(copies[key], main[key.replace("entprop_aux.", "")]) for key in copies)


def test_the_best_model_comes_back_with_its_copies(tmp_path):
    options = {**OPTIONS, **best_of([3.0, 1.0, 2.0, 4.0, 5.0])}
    trainer = make_trainer(tmp_path, model="ResNet", callbacks=[callback(METHOD)], **options)
    states = record_states(trainer)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert_same(trainer.model.state_dict(), states[1])


def test_what_the_trainer_evaluates_is_the_plain_model(tmp_path):
    data = samples(6)
    trainer, _, _ = train(build("ResNet"), callback(METHOD), tmp_path, eval_dataset=data, max_steps=2)
    found = trainer.evaluate()["eval_loss"]
    plain = unwrap(trainer.model).eval()
    images, labels = torch.stack([s["pixel_values"] for s in data]), torch.tensor([s["labels"] for s in data])
    with torch.no_grad():
        assert found == pytest.approx(float(F.cross_entropy(plain(images).logits, labels)), rel=1e-4)


def test_a_second_train_continues(tmp_path):
    trainer, _, gradients = train(build("ResNet"), callback(METHOD), tmp_path, max_steps=2)
    before = {n: v.clone() for n, v in auxiliary_state_dict(trainer.model).items()}
    assert "training_step" not in vars(trainer)
    trainer.train()
    after = auxiliary_state_dict(trainer.model)
    assert len(gradients) == 4
    assert all(any("entprop_aux" in name for name in step) for step in gradients)
    assert not torch.equal(*(next(v for n, v in s.items() if n.endswith("weight")) for s in (before, after)))
    trainer.save_model(tmp_path / "final")
    assert not any("entprop" in key for key in keys_in(tmp_path / "final" / "model.safetensors"))
    assert keys_in(tmp_path / "final" / FILE) == set(after)


def test_a_checkpoint_without_copies_is_refused(tmp_path):
    train(build("ViT"), None, tmp_path, **OPTIONS)
    trainer = make_trainer(tmp_path, callbacks=[callback(METHOD)], **OPTIONS)
    with pytest.raises(CheckpointError, match=FILE):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_another_method_does_not_resume_unnoticed(tmp_path):
    train(build("ResNet"), callback(METHOD), tmp_path, **{**OPTIONS, "max_steps": 2})
    checkpoint = tmp_path / "checkpoint-2"

    def resume(method):
        options = {**OPTIONS, "max_steps": 3, "save_strategy": "no"}
        trainer = make_trainer(tmp_path / "b", model="ResNet", callbacks=[callback(method)], **options)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 3

    with pytest.raises(
        CheckpointError, match=r"EntProp and the auxiliaries \['aux'\].*Vanilla and \[\].*from_pretrained"
    ):
        resume(Vanilla())
    with pytest.raises(CheckpointError, match=r"FineGrainedAdvProp and \['strong', 'weak'\]"):
        resume(FineGrainedAdvProp({"weak": PGD(1 / 255, steps=1), "strong": PGD(4 / 255, steps=2)}))
    with pytest.warns(UserWarning, match="trained with EntProp; the run continues with AdvProp"):
        resume(AdvProp())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was trained with")
        resume(EntProp(fraction=0.2))
