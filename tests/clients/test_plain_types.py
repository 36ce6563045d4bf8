"""Methods from command lines and YAML files: jsonargparse (LightningCLI), HfArgumentParser, keyword arguments."""

from dataclasses import replace

import pytest

from entprop_wrap import EntProp, MixUp
from entprop_wrap.functional import CutMix, uncertainty
from entprop_wrap.functional.attacks import PGD
from entprop_wrap.methods import AdvProp, FastAdvProp, MixProp, Vanilla
from entprop_wrap.methods.base import Method


def test_names_stand_for_objects():
    assert EntProp(mix="mixup", alpha=0.2, uncertainty="logit_margin") == EntProp(
        mix=MixUp(0.2), uncertainty=uncertainty.logit_margin
    )
    assert EntProp(alpha=0.2).mix == MixUp(0.2)
    assert EntProp().mix == MixUp()
    assert EntProp().uncertainty is uncertainty.entropy
    assert EntProp(mix="CutMix").mix == CutMix()
    assert EntProp(mix="none").mix is None
    assert replace(EntProp(mix="cutmix", alpha=0.3), fraction=0.5).mix == CutMix(0.3)
    assert replace(EntProp(alpha=0.3), mix=CutMix(0.5)).mix == CutMix(0.5)
    assert EntProp.finetuning().mix == EntProp.finetuning(mix="mixup", alpha=0.1).mix == MixUp(0.1)
    assert EntProp.finetuning(alpha=0.4).mix == MixUp(0.4)
    assert EntProp.finetuning(mix=None).mix is None
    assert MixProp(mix="cutmix", alpha=0.5) == MixProp(CutMix(0.5))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["entprop_wrap.EntProp", "--m.mix=cutmix", "--m.alpha=0.2"], EntProp(mix=CutMix(0.2))),
        (["entprop_wrap.EntProp", "--m.mix=null", "--m.fraction=0.3"], EntProp(fraction=0.3, mix=None)),
        (["entprop_wrap.EntProp", "--m.uncertainty=random"], EntProp(uncertainty=uncertainty.random)),
        (
            ["entprop_wrap.EntProp", "--m.view=augmix", "--m.attack_steps=0"],
            EntProp(view="augmix", attack_steps=0),
        ),
        (["entprop_wrap.methods.MixProp", "--m.alpha=0.2"], MixProp(MixUp(0.2))),
        (["entprop_wrap.methods.FastAdvProp", "--m.fraction=0.3"], FastAdvProp(fraction=0.3)),
        (["entprop_wrap.methods.Vanilla", "--m.label_smoothing=0.1"], Vanilla(label_smoothing=0.1)),
        (["entprop_wrap.methods.AdvProp", "--m.weight=0.5"], AdvProp(weight=0.5)),
        (["entprop_wrap.methods.AdvProp", "--m.attack.steps=2"], AdvProp(PGD(steps=2))),
    ],
)
def test_jsonargparse_builds_methods(arguments, expected):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--m", type=Method)
    name, *rest = arguments
    config = parser.parse_args([f"--m={name}", *rest])
    again = parser.parse_string(parser.dump(config, skip_none=False))  # as LightningCLI writes it beside a run
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # as older versions call it
    for parsed in (config, again):
        assert instantiate(parsed).m == expected


def test_hugging_faces_parser_builds_entprop():
    transformers = pytest.importorskip("transformers")
    parser = transformers.HfArgumentParser(EntProp)
    assert parser.parse_args_into_dataclasses([]) == (EntProp(),)
    arguments = ["--mix", "cutmix", "--alpha", "0.3", "--uncertainty", "logit_margin", "--epsilon", "0.01"]
    expected = EntProp(mix=CutMix(0.3), uncertainty=uncertainty.logit_margin, epsilon=0.01)
    assert parser.parse_args_into_dataclasses(arguments) == (expected,)
    assert parser.parse_args_into_dataclasses(["--mix", "none", "--mix_on", "auxiliary"])[0].mix is None
