"""LoRA of PEFT with auxiliary copies, in both orders, in a plain loop and in the Hugging Face Trainer."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import entprop_wrap as entprop
from entprop_wrap.errors import ConfigurationError, NotWrappedError, UnsupportedModelError
from entprop_wrap.wrapping.state_dict import without_copies
from tests.helpers.keys import is_auxiliary_key, original_name
from tests.helpers.oracle import auxiliary_tensors, perturb
from tests.integrations.hf_trainer_reference import (
    METHOD,
    SPACE,
    RecordBatches,
    RecordGradients,
    assert_same,
    best_of,
    build,
    callback,
    keys_in,
    make_trainer,
    record_states,
    samples,
)
from tests.integrations.hf_trainer_reference import worst as difference

peft = pytest.importorskip("peft")

TARGETS = {"ViT": r".*(query|value|q_proj|v_proj)", "ResNet": r".*\.convolution"}
NORMS = {"ViT": ["layernorm_before", "layernorm_after"], "ResNet": ["normalization"]}
NAMES = sorted(TARGETS)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def lora(name, *saved):
    saved = ["classifier", *saved] if name == "ViT" else [*saved]
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS[name], modules_to_save=saved or None)


def adapted(model, config):
    torch.manual_seed(7)
    model = peft.get_peft_model(model, config)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)  # zeros would hide every error
    return model


def thaw(model):
    """What the error says."""
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".entprop_" in key)
    return model


def peft_first(name, norms):
    model = entprop.wrap(adapted(build(name), lora(name, *(NORMS[name] if norms else ()))))
    return model if norms else thaw(model)


def wrapped_first(name, norms):
    assert not norms
    return thaw(adapted(entprop.wrap(build(name)), lora(name)))


WAYS = {
    "peft first": functools.partial(peft_first, norms=False),
    "wrapped first": functools.partial(wrapped_first, norms=False),
    "norms saved": functools.partial(peft_first, norms=True),
}
TABLE = pytest.mark.parametrize(("way", "name"), [(way, name) for way in WAYS for name in NAMES])


def batch():
    data = samples(8)
    return torch.stack([s["pixel_values"] for s in data]), torch.tensor([s["labels"] for s in data])


def adapter_keys(folder):
    return keys_in(folder / "adapter_model.safetensors")


def plain_adapter_keys(name, norms, folder):
    adapted(build(name), lora(name, *(NORMS[name] if norms else ()))).save_pretrained(folder)
    return adapter_keys(folder)


@TABLE
def test_adapter_and_copies_train_as_in_two_models_and_the_rest_stays(way, name):
    model = WAYS[way](name).train()
    perturb(model)
    plain = entprop.unwrap(copy.deepcopy(model))
    copies = auxiliary_tensors(model)
    images, labels = batch()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    out = entprop.training_step(model, images, labels, method=METHOD, pixel_space=SPACE)

    main, aux = plain, copy.deepcopy(plain)
    F.cross_entropy(main(pixel_values=images).logits, labels).backward()
    output = functional_call(aux, copies, (), {"pixel_values": out.aux_images})
    (0.5 * F.cross_entropy(output.logits, labels[out.selected])).backward()
    main, aux = dict(main.named_parameters()), dict(aux.named_parameters())
    for key, parameter in model.named_parameters():
        plain_key = original_name(key)
        if is_auxiliary_key(key):
            expected = copies[plain_key].grad
        elif plain_key in copies:
            expected = main[plain_key].grad
        else:
            parts = [p.grad for p in (main[plain_key], aux[plain_key]) if p.grad is not None]
            expected = sum(parts) if parts else None
        assert (parameter.grad is None) == (expected is None), key
        if expected is not None:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5, msg=key)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trainable, lr=0.1).step()
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert any("lora_A" in key for key in moved)
    assert any("lora_B" in key for key in moved)
    assert any(map(is_auxiliary_key, moved))
    main_norms = {key for key in moved if not is_auxiliary_key(key) and any(n in key for n in NORMS[name])}
    assert bool(main_norms) == (way == "norms saved")
    kinds = ("lora_", ".entprop_", "modules_to_save")
    assert all(any(kind in key for kind in kinds) for key in moved)


@TABLE
def test_what_is_saved_is_plain(way, name, tmp_path):
    model = WAYS[way](name).train()
    images, labels = batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    entprop.training_step(model, images, labels, method=METHOD, pixel_space=SPACE)
    optimizer.step()
    expected = plain_adapter_keys(name, way == "norms saved", tmp_path / "plain")
    state = set(model.state_dict())
    with without_copies(model):
        model.save_pretrained(tmp_path / "during")
    assert set(model.state_dict()) == state
    assert adapter_keys(tmp_path / "during") == expected
    model.eval()
    with torch.no_grad():
        before = model(pixel_values=images).logits
    entprop.unwrap(model)
    model.save_pretrained(tmp_path / "after")
    assert adapter_keys(tmp_path / "after") == expected
    merged = model.merge_and_unload()
    assert set(merged.state_dict()) == set(build(name).state_dict())
    again = peft.PeftModel.from_pretrained(build(name), tmp_path / "after").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(pixel_values=images).logits, before, rtol=1e-3, atol=1e-4)
        if name == "ViT":  # running statistics of frozen norms belong to the base, not to the adapter
            torch.testing.assert_close(again(pixel_values=images).logits, before, rtol=1e-4, atol=1e-5)


def test_copies_frozen_at_what_they_copy_are_refused(tmp_path):
    images, labels = batch()
    for model in (entprop.wrap(adapted(build("ViT"), lora("ViT"))), adapted(entprop.wrap(build("ViT")), lora("ViT"))):
        with pytest.raises(ConfigurationError, match="frozen and equal"):
            entprop.training_step(model.train(), images, labels, method=METHOD, pixel_space=SPACE)
    with pytest.raises(ConfigurationError, match="frozen and equal"):
        make(adapted(build("ViT"), lora("ViT")), tmp_path).train()


def test_norms_saved_after_wrapping_are_refused():
    model = adapted(entprop.wrap(build("ViT")), lora("ViT", *NORMS["ViT"])).train()
    images, labels = batch()
    with pytest.raises(UnsupportedModelError, match="copies taken out of a wrapped model"):
        entprop.training_step(model, images, labels, method=METHOD, pixel_space=SPACE)


def test_merging_before_unwrapping_says_what_to_unwrap():
    model = WAYS["peft first"]("ViT")
    merged = model.merge_and_unload()
    with pytest.raises(NotWrappedError, match="Expected the model that was passed"):
        entprop.unwrap(merged)
    entprop.unwrap(model)
    assert set(merged.state_dict()) == set(build("ViT").state_dict())


def make(model, folder, *callbacks, **options):
    callbacks = [callback(), *callbacks]
    return make_trainer(folder, model=model, callbacks=callbacks, label_names=["labels"], **{"max_steps": 2, **options})


@pytest.mark.parametrize(("way", "name"), [("peft first", "ViT"), ("wrapped first", "ResNet"), ("norms saved", "ViT")])
def test_the_trainer_saves_plain_adapters_and_resumes_bit_for_bit(way, name, tmp_path):
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 1}
    collator, recorded = RecordBatches(), RecordGradients()
    whole = make(WAYS[way](name), tmp_path / "a", recorded, data_collator=collator, **options)
    whole.train()
    model = WAYS[way](name).train()
    (first,) = collator.batches[:1]
    entprop.training_step(model, first["pixel_values"], first["labels"], method=METHOD, pixel_space=SPACE)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert difference(recorded.steps[:1], [expected]) < 1e-3

    expected = plain_adapter_keys(name, way == "norms saved", tmp_path / "plain")
    for number in (1, 2):
        assert adapter_keys(tmp_path / "a" / f"checkpoint-{number}") == expected
    again = make(WAYS[way](name), tmp_path / "b", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    state = again.model.state_dict()
    different = [key for key, value in whole.model.state_dict().items() if not torch.equal(value, state[key])]
    if name == "ResNet":  # an adapter holds no running statistics of norms that it does not save; nor does PEFT alone
        different = [key for key in different if is_auxiliary_key(key) or not key.endswith(STATISTICS)]
    assert different == []
    again.save_model(tmp_path / "final")
    assert adapter_keys(tmp_path / "final") == expected


@pytest.mark.parametrize("way", ["wrapped first", "norms saved"])
def test_the_best_adapter_comes_back_with_its_copies(way, tmp_path):
    trainer = make(WAYS[way]("ViT"), tmp_path, max_steps=3, **best_of([3.0, 1.0, 2.0, 4.0]))
    states = record_states(trainer)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert_same(trainer.model.state_dict(), states[1])
