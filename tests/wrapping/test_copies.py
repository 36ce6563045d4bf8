"""Copies of wrapped models, checkpoints, and averages."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel, update_bn

import entprop_wrap as entprop
from entprop_wrap.errors import AlreadyWrappedError, CheckpointError, NotWrappedError, UnsupportedModelError
from entprop_wrap.wrapping.state_dict import auxiliary_names, without_copies
from entprop_wrap.wrapping.switched_norm import copy_class, switched_class, view_class
from tests.helpers.keys import is_auxiliary_key
from tests.helpers.norm_nets import Named, rows, toy
from tests.helpers.oracle import (
    assert_pass,
    changed,
    loss_of,
    perturb,
    snapshot,
)


def _wrapped(norm="batch", **options):
    model = entprop.wrap(toy(norm), **options)
    perturb(model)
    return model


def _exact(model, batch=None):
    """Both domains of ``model`` compute what its own weights say."""
    batch = rows() if batch is None else batch
    plain = toy("batch")
    plain.load_state_dict(entprop.main_state_dict(model))
    for auxiliary in (None, "aux"):
        assert_pass(model, plain, batch, auxiliary)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved], ids=["deepcopy", "pickle", "torch.save"])
def test_a_duplicate_lives_on_its_own(duplicate):
    model = _wrapped()
    twin = duplicate(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    before = snapshot(model)
    _exact(twin)
    assert not changed(model, before)
    before = snapshot(twin)
    _exact(model)
    assert not changed(twin, before)
    with entprop.auxiliary(twin):
        assert model._entprop_registry.switch.resolve() is None
    assert entprop.summary(twin) == entprop.summary(model)
    with pytest.raises(AlreadyWrappedError):
        entprop.wrap(twin)
    entprop.unwrap(model)
    _exact(twin)
    entprop.unwrap(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in toy("batch").modules()]
    assert not twin._forward_hooks
    assert not model._forward_hooks


@pytest.mark.parametrize("protocol", [0, pickle.HIGHEST_PROTOCOL])
def test_old_and_new_pickle_protocols(protocol):
    _exact(pickle.loads(pickle.dumps(_wrapped(), protocol)))


def test_duplicated_inside_a_block_it_is_at_rest():
    model = _wrapped()
    with entprop.auxiliary(model):
        twin, again = copy.deepcopy(model), _pickled(model)
    for each in (twin, again):
        assert each._entprop_registry.switch.resolve() is None
        _exact(each)


def test_a_pickle_opens_where_no_class_was_made_yet():
    model = _wrapped()
    pickled, wanted = pickle.dumps(model), model.eval()(rows())
    with entprop.auxiliary(model):
        hard = model(rows())
    for classes in (switched_class, copy_class, view_class):
        classes.cache_clear()
    opened = pickle.loads(pickled).eval()
    assert type(opened.last) is not type(model.last)
    torch.testing.assert_close(opened(rows()), wanted)
    with entprop.auxiliary(opened):
        torch.testing.assert_close(opened(rows()), hard)
    assert type(entprop.unwrap(opened).last) is nn.LayerNorm


def test_a_part_taken_out_is_at_rest_in_the_main_domain():
    model = _wrapped()
    with entprop.auxiliary(model):
        part = copy.deepcopy(model.blocks[0])
        inside = part(torch.randn(4, 8))
    assert inside.shape == (4, 8)
    assert part.inner.num_batches_tracked == 1
    with pytest.raises(NotWrappedError, match="copy of a part"), entprop.auxiliary(part):
        pass


# Checkpoints


def test_a_plain_checkpoint_restarts_the_copies():
    model = _wrapped()
    plain = toy("batch", seed=5)
    plain(rows())
    assert model.load_state_dict(plain.state_dict(), strict=True)
    for name, norm, copied in model._entprop_registry.copied_parameters():
        assert torch.equal(norm, copied), name
        assert norm.data_ptr() != copied.data_ptr()
    assert torch.equal(model.blocks[0].inner.entprop_aux.running_mean, plain.blocks[0].inner.running_mean)
    _exact(model)


def test_a_checkpoint_without_metadata_or_batch_counts():
    state = {key: value for key, value in toy("batch").state_dict().items() if "num_batches" not in key}
    toy("batch").load_state_dict(state)
    model = _wrapped()
    model.load_state_dict(state)
    _exact(model)


def test_assigning_a_checkpoint():
    model = _wrapped()
    model.load_state_dict(toy("batch", seed=5).state_dict(), assign=True)
    pairs = list(model._entprop_registry.copied_parameters())
    assert all(isinstance(copied, nn.Parameter) and copied.requires_grad for _, _, copied in pairs)
    assert not {id(norm) for _, norm, _ in pairs} & {id(copied) for _, _, copied in pairs}
    _exact(model)


def test_a_wrapped_checkpoint_round_trips():
    model, fresh = _wrapped(), entprop.wrap(toy("batch", seed=5))
    with entprop.auxiliary(model):
        model(rows())
    fresh.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0)
    _exact(fresh)


def test_the_two_parts_make_up_the_whole():
    model = _wrapped()
    main, copies = entprop.main_state_dict(model), entprop.auxiliary_state_dict(model)
    assert list(main) == list(toy("batch").state_dict())
    assert {*main, *copies} == set(model.state_dict())
    assert all(is_auxiliary_key(key) for key in copies)
    compiled = torch.compile(model, backend="eager")
    assert list(entprop.main_state_dict(compiled)) == list(main)


def test_the_main_part_keeps_the_versions_of_the_modules():
    class Versioned(nn.Module):
        _version = 2

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            if (local_metadata.get("version") or 1) < 2:
                state_dict[prefix + "weight"] = state_dict[prefix + "weight"] + 100
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    plain = nn.Sequential(Versioned(), nn.LayerNorm(3))
    main = entprop.main_state_dict(entprop.wrap(copy.deepcopy(plain)))
    assert main._metadata == plain.state_dict()._metadata
    plain.load_state_dict(main)
    assert torch.equal(plain[0].weight, torch.ones(3))


def test_copies_that_do_not_fit():
    model = _wrapped()
    other = entprop.wrap(toy("batch"), auxiliaries=("aux", "more"))
    with pytest.raises(CheckpointError, match="0 missing and 22 unexpected"):
        entprop.load_auxiliary_state_dict(entprop.wrap(toy("layer")), entprop.auxiliary_state_dict(other))
    with pytest.raises(CheckpointError, match=r"missing and 0 unexpected.*same auxiliaries="):
        entprop.load_auxiliary_state_dict(other, entprop.auxiliary_state_dict(model))


def test_loading_copies_leaves_the_main_weights():
    model, fresh = _wrapped(), entprop.wrap(toy("batch", seed=5))
    before = snapshot(fresh)
    entprop.load_auxiliary_state_dict(fresh, entprop.auxiliary_state_dict(model))
    assert all(is_auxiliary_key(name) for name in changed(fresh, before))
    _exact(fresh)


def test_one_auxiliary_of_two_in_a_checkpoint():
    model, fresh = _wrapped(), entprop.wrap(toy("batch", seed=5), auxiliaries=("aux", "more"))
    fresh.load_state_dict(model.state_dict(), strict=True)
    found = fresh.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    others = {name: original for name, original in auxiliary_names(fresh).items() if ".entprop_more." in name}
    assert others
    assert all(torch.equal(found[name], found[original]) for name, original in others.items())


def test_parts_named_like_copies_are_the_models_own():
    plain = Named()
    model = entprop.wrap(copy.deepcopy(plain))
    main, copies = entprop.main_state_dict(model), entprop.auxiliary_state_dict(model)
    assert list(main) == list(plain.state_dict())
    assert len(copies) == 5
    assert all(key.startswith("entprop_norm.entprop_aux.") for key in copies)
    decayed, undecayed = entprop.parameter_groups(model, 0.1)
    assert sum(map(torch.numel, decayed["params"])) == 8 * 8 + 8 + 8 * 5
    assert len(undecayed["params"]) == 4 + 2
    entprop.load_auxiliary_state_dict(model, copies)
    with without_copies(model):
        assert list(model.state_dict()) == list(main)


def test_names_are_those_of_the_model_that_is_asked():
    model = nn.Sequential(_wrapped())
    names = auxiliary_names(model)
    assert names["0.last.entprop_aux.weight"] == "0.last.weight"
    assert set(names) == {key for key in model.state_dict() if ".entprop_aux." in key}
    checkpointed = checkpoint_wrapper(_wrapped())
    assert set(auxiliary_names(checkpointed)) >= {key for key in checkpointed.state_dict() if ".entprop_aux." in key}
    assert list(entprop.main_state_dict(checkpointed)) == list(toy("batch").state_dict())


# Copies that were loaded, and a plain checkpoint after them


def _loaded(model):
    entprop.load_auxiliary_state_dict(model, entprop.auxiliary_state_dict(_wrapped()))
    return model, {key: value.clone() for key, value in entprop.auxiliary_state_dict(model).items()}


def _unchanged(model, copies):
    return all(torch.equal(value, copies[key]) for key, value in entprop.auxiliary_state_dict(model).items())


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_copies_that_were_loaded_stay(assign):
    model, copies = _loaded(entprop.wrap(toy("batch", seed=5)))
    plain = toy("batch", seed=6).state_dict()
    for _ in range(2):
        model.load_state_dict(plain, strict=True, assign=assign)
        assert _unchanged(model, copies)
    assert all(torch.equal(value, plain[key]) for key, value in entprop.main_state_dict(model).items())
    _exact(model)


@pytest.mark.parametrize("train", ["parameters", "statistics"])
def test_copies_that_were_trained_start_again(train):
    model, copies = _loaded(entprop.wrap(toy("batch", seed=5)))
    if train == "statistics":
        with entprop.auxiliary(model):
            model(rows())
    else:
        with torch.no_grad():
            for parameter in entprop.parameter_groups(model, 0.1)[1]["params"]:
                parameter.mul_(1.5)
    model.load_state_dict(toy("batch", seed=6).state_dict())
    norm = model.blocks[0].inner
    assert torch.equal(norm.entprop_aux.running_mean, norm.running_mean)
    assert not _unchanged(model, copies)


def test_a_wrapped_checkpoint_replaces_copies_that_were_loaded():
    model, copies = _loaded(entprop.wrap(toy("batch", seed=5)))
    other = entprop.wrap(toy("batch", seed=6))
    model.load_state_dict(other.state_dict())
    assert _unchanged(model, entprop.auxiliary_state_dict(other))
    assert not _unchanged(model, copies)


# Moving and averaging


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model = _wrapped("layer").to(dtype)
    with entprop.auxiliary(model):
        loss_of(model(rows().to(dtype)), rows()).backward()
    assert all(p.grad is None or p.grad.dtype == dtype for p in model.parameters())


def test_swa_and_its_update_of_statistics():
    model = _wrapped()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    update_bn([rows()], averaged)
    assert averaged.module.blocks[0].inner.num_batches_tracked == 1
    _exact(averaged.module)
    assert not any(is_auxiliary_key(key) for key in entprop.unwrap(averaged.module).state_dict())
    assert any(is_auxiliary_key(key) for key in model.state_dict())


def test_peft_modules_to_save():
    """PEFT copies the modules it trains: their norms are no longer the wrapped model's, and that is said."""
    peft = pytest.importorskip("peft")
    model = _wrapped("layer")
    config = peft.LoraConfig(target_modules=["linear"], modules_to_save=["last"])
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(UnsupportedModelError, match="copies taken out of a wrapped model"), entprop.auxiliary(adapted):
        pass


def test_wrapping_after_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(toy("layer"), peft.LoraConfig(target_modules=["linear"]))
    model = entprop.wrap(adapted)
    perturb(model)
    with entprop.auxiliary(model):
        inside = model(rows())
    assert not torch.equal(inside, model(rows()))
    assert not any(is_auxiliary_key(key) for key in entprop.unwrap(model).state_dict())
