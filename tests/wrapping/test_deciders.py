"""Whatever decides by class or by name (weight decay, freezing) decides alike for a norm and its copy.

For the main parameters it decides as on the plain model.
"""

import copy
import functools
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import entprop_wrap as entprop
from entprop_wrap.wrapping.state_dict import auxiliary_names


def _timm(name, **options):
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=5, **options)


def _group_norm_net():
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18(num_classes=5, norm_layer=partial(nn.GroupNorm, 8))


NETS = {
    "batch norm": functools.cache(_timm("test_resnet")),
    "layer norm": functools.cache(_timm("test_vit")),
    "group norm": functools.cache(_group_norm_net),
    "batch norm with activation": functools.cache(_timm("test_efficientnet")),
}


NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def _set_weight_decay(model):
    # torchvision's references/classification/utils.py: by the class of the owner, module by module.
    classes = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    groups = {"norm": [], "other": []}

    def add(module):
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                groups["norm" if isinstance(module, classes) else "other"].append(parameter)
        for child in module.children():
            add(child)

    add(model)
    return groups


def _split_normalization_params(model):
    norm, other = pytest.importorskip("torchvision").ops._utils.split_normalization_params(model)
    return {"norm": norm, "other": other}


def _every_norm_of_a_class(model):
    norms = [m for m in model.modules() if isinstance(m, NORMS)]
    mine = [parameter for norm in norms for parameter in norm.parameters()]
    return {"norm": mine, "other": [p for p in model.parameters() if id(p) not in set(map(id, mine))]}


def _timm_groups(name):
    def groups(model):
        optim = pytest.importorskip("timm.optim")
        made = getattr(optim, name)(model, 0.05)
        return {
            (group["weight_decay"], group.get("lr_scale"), index): group["params"] for index, group in enumerate(made)
        }

    return groups


def _hugging_face(model):
    trainer = pytest.importorskip("transformers").Trainer
    decayed = set(trainer.get_decay_parameter_names(None, model))
    groups = {"decayed": [], "undecayed": []}
    for name, parameter in model.named_parameters():
        groups["decayed" if name in decayed else "undecayed"].append(parameter)
    return groups


def _frozen(freeze):
    def groups(model):
        freeze(model)
        return {on: [p for p in model.parameters() if p.requires_grad is on] for on in (True, False)}

    return groups


def _lightning(model):
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    callbacks.BaseFinetuning.freeze(model, train_bn=True)


def _freeze_batch_norm(model):
    for module in model.modules():
        if isinstance(module, NORMS):
            module.weight.requires_grad = False


def _freeze_the_first(model):
    for parameter in _first_norm(model).parameters():
        parameter.requires_grad = False


def _first_norm(model):
    return next(module for module in model.modules() if isinstance(module, NORMS))


def _filtered(model):
    tuning = pytest.importorskip("lightning.pytorch.callbacks").BaseFinetuning
    chosen = list(tuning.filter_params(model, train_bn=False))
    return {"chosen": chosen, "left out": [p for p in model.parameters() if id(p) not in set(map(id, chosen))]}


DECIDERS = {
    "torchvision references": _set_weight_decay,
    "torchvision split": _split_normalization_params,
    "isinstance": _every_norm_of_a_class,
    "timm weight decay": _timm_groups("param_groups_weight_decay"),
    "timm layer decay": _timm_groups("param_groups_layer_decay"),
    "Hugging Face": _hugging_face,
    "Lightning freeze": _frozen(_lightning),
    "Lightning filter": _filtered,
    "freezing by class": _frozen(_freeze_batch_norm),
    "freezing one layer": _frozen(_freeze_the_first),
    "freezing the layer": _frozen(lambda model: _first_norm(model).requires_grad_(False)),
    "freezing by module": _frozen(lambda model: next(iter(model.children())).requires_grad_(False)),
}


def _decisions(decide, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of parameters that come twice
        groups = decide(model)
        torch.optim.SGD([{"params": parameters} for parameters in groups.values() if parameters], lr=0.1)
    for decision, parameters in groups.items():
        for parameter in parameters:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = decision
    assert found.keys() == set(names.values())
    return found


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("decider", DECIDERS)
def test_a_copy_is_treated_like_its_norm(decider, net):
    plain = copy.deepcopy(NETS[net]())
    model = entprop.wrap(copy.deepcopy(plain))
    copies = auxiliary_names(model)
    expected, found = _decisions(DECIDERS[decider], plain), _decisions(DECIDERS[decider], model)
    assert {name: found[name] for name in expected} == expected
    different = [name for name in found if name in copies and found[name] != found[copies[name]]]
    assert not different, f"{len(different)} of {len(set(copies) & set(found))}, such as {different[0]}"


@pytest.mark.parametrize("net", NETS)
def test_initialising_by_class_reaches_the_copies(net):
    def start(module):
        if isinstance(module, NORMS):
            nn.init.constant_(module.weight, 0.5)

    model = entprop.wrap(copy.deepcopy(NETS[net]())).apply(start)
    pairs = list(model._entprop_registry.copied_parameters())
    assert pairs
    assert all(torch.equal(norm, copied) for _, norm, copied in pairs)


def test_recalibration_leaves_the_statistics_of_the_copies():
    """``update_bn`` fills the main statistics again, and knows no way to fill those of the copies."""
    model = entprop.wrap(copy.deepcopy(NETS["batch norm"]()))
    with entprop.auxiliary(model):
        model(torch.randn(4, 3, 32, 32))
    before = model.bn1.entprop_aux.running_mean.clone()
    assert before.any()
    torch.optim.swa_utils.update_bn([torch.randn(4, 3, 32, 32)], model)
    assert torch.equal(model.bn1.entprop_aux.running_mean, before)
    assert model.bn1.num_batches_tracked == 1


def test_a_parameter_frozen_by_its_full_name_leaves_its_copy_training():
    model = entprop.wrap(copy.deepcopy(NETS["batch norm"]()))
    model.get_parameter("bn1.weight").requires_grad_(False)
    assert model.bn1.entprop_aux.weight.requires_grad
    optimizer = torch.optim.SGD(entprop.parameter_groups(model, 0.0), lr=0.1)
    before = model.bn1.weight.clone()
    entprop.training_step(model.train(), torch.rand(40, 3, 32, 32), torch.arange(40) % 5)
    optimizer.step()
    assert torch.equal(model.bn1.weight, before)
    assert not torch.equal(model.bn1.entprop_aux.weight, before)


def test_a_copy_frozen_by_itself():
    model = entprop.wrap(copy.deepcopy(NETS["batch norm"]()))
    model.bn1.entprop_aux.requires_grad_(False)
    assert not model.bn1.entprop_aux.weight.requires_grad
    assert model.bn1.weight.requires_grad
    assert isinstance(model.bn1.entprop_aux, nn.BatchNorm2d)
    assert model.bn1.entprop_aux.num_features == model.bn1.num_features
