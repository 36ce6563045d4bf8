"""evaluate_robustness against a loop over single images, on plain, wrapped and real models."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import entprop_wrap as entprop
from entprop_wrap import PixelSpace
from entprop_wrap.errors import (
    ConfigurationError,
    DataError,
    ImageError,
    LabelError,
    ModelOutputError,
    NotWrappedError,
    PixelRangeError,
    UnsupportedModelError,
)
from entprop_wrap.functional import attacks
from entprop_wrap.robustness import CORRUPTIONS, FGSM, PGD, SUITES, corruption, evaluate_robustness
from entprop_wrap.robustness.corruptions.random import Draws, Streams
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.small_classifier import SPACE, classifier, dataset, loader, pixels

ONE = {"corruptions": ("gaussian_noise",), "severities": (3,), "progress": False}


def evaluate(model=None, data=None, **options):
    chosen = {"pixel_space": SPACE, **ONE, **options}
    return evaluate_robustness(classifier() if model is None else model, loader() if data is None else data, **chosen)


def naive_accuracies(model, data, seed, names, severities):
    """Corrupt and classify one image after the other."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (SPACE.mean, SPACE.std))
    table = {}
    for name in names:
        for severity in severities:
            right = 0
            for i, (image, label) in enumerate(data):
                pixel = (image * std + mean).clamp(0, 1)[None]
                generator = Streams(seed).at(i, name, severity)
                changed = CORRUPTIONS[name](pixel, severity, generator)[0]
                right += int(model(((changed - mean) / std)[None]).argmax() == label)
            table[name, severity] = right / len(data)
    return table


def test_scores_equal_a_loop_over_images():
    model, images = classifier(), dataset(7).tensors[0]
    data = TensorDataset(images, model(images).argmax(1))
    found = evaluate_robustness(model, DataLoader(data, 4), pixel_space=SPACE, seed=7, progress=False)
    expected = naive_accuracies(model, data, 7, tuple(CORRUPTIONS), range(1, 6))
    assert found.table == expected
    assert list(found.table) == list(expected)
    assert found.clean.images == 7
    assert found.sa == 1
    assert found.ra == pytest.approx(sum(expected.values()) / 75, abs=1e-15)
    assert len(set(expected.values())) > 3  # the model does react
    logits = model(data.tensors[0]).detach()
    assert found.clean.loss == pytest.approx(float(nn.functional.cross_entropy(logits, data.tensors[1])), rel=1e-6)


def test_a_suite_is_all_of_its_corruptions():
    found = evaluate(data=loader(3), corruptions=None, suite="c-bar", severities=(1, 2, 3, 4, 5))
    assert {name for name, _ in found.table} == set(SUITES["c-bar"])
    assert "the 10 corruptions of ImageNet-C-bar x 5 severities" in found.protocol
    one = evaluate(data=loader(3), corruptions=("plasma_noise",), severities=(3,))
    assert one.table == {("plasma_noise", 3): found.table["plasma_noise", 3]}
    with pytest.raises(ConfigurationError, match="'c' or 'c-bar', found 'cbar'"):
        evaluate(corruptions=None, suite="cbar")
    with pytest.raises(ConfigurationError, match="twice"):
        evaluate(corruptions=("fog",), suite="c")


def test_batch_size_changes_nothing():  # nor does a last batch of one image
    options = {"severities": (2,), "corruptions": None, "attacks": {"PGD": PGD(1 / 255, steps=2)}}
    whole, parts = (evaluate(data=loader(13, size), **options) for size in (13, 3))
    assert whole.table == parts.table
    assert whole.adversarial["PGD"].accuracy == parts.adversarial["PGD"].accuracy
    assert whole.adversarial["PGD"].loss == pytest.approx(parts.adversarial["PGD"].loss, rel=1e-5)


def test_the_seed_matters_and_global_random_state_does_not():
    model, data = classifier(), list(loader())  # iterating over a DataLoader does draw from it
    torch.manual_seed(1)
    first = evaluate(model, data, seed=1)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert evaluate(model, data, seed=1) == first
    assert torch.equal(torch.get_rng_state(), state)
    other = evaluate(model, data, seed=2)
    assert other.corrupted != first.corrupted
    assert other.clean == first.clean


def test_streams_continue_where_other_batches_end():
    alone = Draws(torch.empty(7, 1), Streams(3).at(0, "fog", 2)).uniform((2,))
    streams = Streams(3)
    parts = [Draws(torch.empty(n, 1), streams.at(at, "fog", 2)).uniform((2,)) for at, n in ((0, 3), (3, 4))]
    assert torch.equal(torch.cat(parts), alone)
    back = Draws(torch.empty(3, 1), streams.at(0, "fog", 2)).uniform((2,))
    assert torch.equal(back, alone[:3])
    for other in (Streams(4).at(0, "fog", 2), Streams(3).at(0, "fog", 3), Streams(3).at(0, "snow", 2)):
        assert not torch.equal(Draws(torch.empty(7, 1), other).uniform((2,)), alone)


def test_models_share_corrupted_batches_also_of_a_corruption_of_ones_own():
    calls = []

    @corruption((0.9, 0.8, 0.7, 0.6, 0.5))
    def dimmed(pixels, draws, kept):
        calls.append(len(pixels))
        return pixels * kept

    models = {"vanilla": classifier(0), "EntProp": classifier(1)}
    both = evaluate(models, corruptions=("fog", dimmed))
    assert calls == [4, 4, 3]
    assert list(both) == ["vanilla", "EntProp"]
    for name, model in models.items():
        assert both[name] == evaluate(model, corruptions=("fog", dimmed))
    assert both["vanilla"].clean != both["EntProp"].clean
    assert ", fog, dimmed x severity 3 - another protocol" in both["vanilla"].protocol
    dimmed.__name__ = "fog"
    with pytest.raises(ConfigurationError, match="has the name of another, 'fog'"):
        evaluate(corruptions=(dimmed,))


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"data": [dict(zip(keys, batch, strict=True)) for batch in loader()]}
            for keys in (("pixel_values", "labels"), ("images", "label"), ("image", "labels"))
        ),
        {"data": iter(loader())},
    ],
    ids=["pixel_values", "images", "image", "a stream"],
)
def test_forms_of_data_that_change_nothing(options):
    assert evaluate(**options) == evaluate()


def test_pixels_and_normalised_images_agree():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = classifier()

        def forward(self, x):
            mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (SPACE.mean, SPACE.std))
            return self.inner((x - mean) / std)

    plain = loader(space=PixelSpace())
    some = ("gaussian_noise", "snow", "elastic_transform")
    found = evaluate(Normalised().eval(), plain, pixel_space=None, corruptions=some)
    assert found.table == evaluate(corruptions=some).table


def test_models_of_the_hub():
    architecture = next(a for a in ARCHITECTURES if a.name == "transformers/resnet")
    model = architecture.build().eval()
    data = loader(6, side=architecture.size)
    found = evaluate(model, data)
    assert found.sa == sum(int((model(x).logits.argmax(1) == y).sum()) for x, y in data) / 6
    wrapped = entprop.wrap(model)
    assert evaluate(wrapped, data) == found


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_take_images_in_their_own_dtype(dtype):
    assert evaluate(classifier().to(dtype)).clean.images == 11


def test_autocast_is_respected():
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(attacks={"FGSM": FGSM(1 / 255)})
    assert found.clean.loss == pytest.approx(evaluate().clean.loss, rel=0.02)
    assert found.clean.loss != evaluate().clean.loss


def test_half_precision_images_are_corrupted_in_float32():
    data = [(x.half(), y) for x, y in loader()]
    assert abs(evaluate(data=data).clean.loss - evaluate().clean.loss) < 0.01


def test_auxiliary_domains():
    model = entprop.wrap(classifier(), auxiliaries=("adv", "far"))
    with torch.no_grad():
        for norm in (m for m in model.modules() if "entprop_adv" in m._modules):
            norm.entprop_adv.running_mean.add_(1.5)
    plain = classifier()
    attacks = {"FGSM": FGSM(2 / 255)}
    found = evaluate(model, auxiliaries=True, attacks=attacks, shifts={"half": loader(5)})
    assert list(found.auxiliaries) == ["adv", "far"]
    main = evaluate(plain, attacks=attacks, shifts={"half": loader(5)})
    assert evaluate(model, attacks=attacks, shifts={"half": loader(5)}) == main
    assert (found.clean, found.corrupted, found.adversarial) == (main.clean, main.corrupted, main.adversarial)
    assert found.auxiliaries["far"] == main
    with torch.no_grad():
        plain[1].running_mean.add_(1.5)
    assert found.auxiliaries["adv"] == evaluate(plain, attacks=attacks, shifts={"half": loader(5)})
    assert found.auxiliaries["adv"] != main
    assert "| domain | main | adv | far |" in found.to_markdown()
    mixed = evaluate({"wrapped": model, "plain": classifier()}, auxiliaries=True)
    assert (len(mixed["wrapped"].auxiliaries), len(mixed["plain"].auxiliaries)) == (2, 0)
    with pytest.raises(NotWrappedError, match="auxiliaries=True"):
        evaluate(classifier(), auxiliaries=True)


def test_shifts_and_attacks():
    model = classifier()
    other = loader(7, seed=5)
    attack = PGD(4 / 255, steps=3)
    found = evaluate(model, shifts={"sketch": other}, attacks={"PGD-3": attack})
    assert found.shifts["sketch"] == evaluate(model, other).clean
    images, labels = dataset(11).tensors
    attacked = attack(model, images, labels, SPACE, Streams(0).at(0, "attack", "PGD-3"))
    assert found.adversarial["PGD-3"].accuracy == float((model(attacked).argmax(1) == labels).double().mean())
    assert (found.sa, found.ra) == (evaluate(model).sa, evaluate(model).ra)
    assert "under PGD-3" in found.to_markdown()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: [PGD()], "attacks must be a dict .* found list"),
        (lambda model: {"a": PGD}, r"attacks\['a'\] must be an attack such as PGD\(\), .* found the class PGD"),
        (lambda model: {"a": model}, r"attacks\['a'\] must be an attack .* found the model Sequential"),
        (lambda model: {"a": 4 / 255}, "must be an attack .* found 0.0"),
        (lambda model: {"a": attacks.PGD}, "found the class PGD"),
    ],
)
def test_attacks_that_are_none_are_refused_before_anything_runs(make, message):
    model = classifier()
    model.register_forward_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(ConfigurationError, match=message):
        evaluate_robustness(model, loader(), pixel_space=SPACE, attacks=make(model), progress=False)


def test_an_attack_that_does_not_fit_the_model_is_found_after_one_pass():
    def unfit(model, images, labels, space, generator):
        raise ConfigurationError("too few classes")

    passes = []
    model = classifier()
    model.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ConfigurationError, match="too few"):
        evaluate(model, attacks={"a": unfit}, corruptions=None)
    assert len(passes) == 1
    with pytest.raises(DataError, match=r"shifts\['sketch'\]: expected an iterable"):
        evaluate(model, shifts={"sketch": 3})
    assert len(passes) == 1


def test_an_attack_may_be_any_function():
    found = evaluate(attacks={"black": lambda model, x, y, space, generator: space.bounds(x)[0].expand_as(x)})
    assert found.adversarial["black"].images == 11
    with pytest.raises(PixelRangeError):
        evaluate(attacks={"outside": lambda model, x, y, space, generator: x + 9})


def test_the_model_is_left_as_it_was():
    model = entprop.wrap(classifier())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, auxiliaries=True, attacks={"PGD": PGD(1 / 255, steps=2)})
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


# What must not give a score


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.train(), ConfigurationError, r"model.eval\(\)"),
        (lambda m: m[1].train() and m, ConfigurationError, "part '1' is in training mode"),
        (lambda m: m.forward, UnsupportedModelError, "expected a torch.nn.Module, found method"),
        (lambda m: nn.Sequential(*m[:-2]).eval(), ModelOutputError, "logits of shape"),
        (lambda m: {}, ConfigurationError, "empty dict"),
        (lambda m: {"a": m, "b": classifier().train()}, ConfigurationError, "b is in training mode"),
    ],
)
def test_models_that_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        evaluate(change(classifier()))


def test_an_auxiliary_block_is_refused():
    model = entprop.wrap(classifier())
    with entprop.auxiliary(model), pytest.raises(UnsupportedModelError, match="auxiliaries=True"):
        evaluate(model)
    assert evaluate(model).clean.images == 11


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clean", [True, False])
def test_logits_that_are_not_finite_are_refused(value, clean):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = classifier(), 0

        def forward(self, x):
            self.calls += 1
            found = self.inner(x)
            if (self.calls == 1) == clean:
                found[0, 1] = value
            return found

    with pytest.raises(
        ModelOutputError,
        match=("clean images" if clean else "gaussian_noise 3") + ".*: the logits of 1 images are NaN or infinite",
    ):
        evaluate(Broken().eval())


RAW, LABELS = pixels(4), torch.tensor([0, 1, 2, 3])
IMAGES = dataset(4).tensors[0]


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (RAW.mul(255).byte(), LABELS, ImageError, "float"),
        (RAW * 255, LABELS, PixelRangeError, "0-255"),
        (IMAGES[..., :31], LABELS, ImageError, "32 px"),
        (IMAGES.clone().index_fill_(0, torch.tensor([1]), float("nan")), LABELS, ImageError, "not finite"),
        (torch.linspace(0, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32), LABELS, PixelRangeError, "Leave pixel_space out"),
        (IMAGES, LABELS + 2, LabelError, r"must be in \[0, 4\]; found \[2, 5\]"),
        (IMAGES, LABELS - 1, LabelError, r"found \[-1, 2\]"),
        (IMAGES, LABELS[:3], LabelError, "4 class indices"),
        (IMAGES, LABELS.float(), LabelError, r"labels\.long"),
        (IMAGES, torch.eye(5)[:4], LabelError, "argmax"),
    ],
)
def test_batches_that_are_refused(images, labels, error, message):
    with pytest.raises(error, match=message):
        evaluate(data=[(images, labels)])


def test_pixel_spaces_that_do_not_fit_the_images():
    with pytest.raises(PixelRangeError, match="looks normalised"):
        evaluate(data=[(IMAGES, LABELS)], pixel_space=None)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (SPACE.mean, SPACE.std))
    overshooting = (RAW * 1.1 - 0.05 - mean) / std  # as interpolation does
    assert evaluate(data=[(overshooting, LABELS)]).clean.images == 4


@pytest.mark.parametrize("data", [[], DataLoader(TensorDataset(RAW[:0], LABELS[:0]), 4)])
def test_empty_data_is_refused(data):
    with pytest.raises(DataError, match="empty"):
        evaluate(data=data)
    with pytest.raises(DataError, match=r"shifts\['sketch'\] is empty"):
        evaluate(shifts={"photo": loader(4), "sketch": data})


def test_data_of_another_form_is_refused():
    with pytest.raises(DataError, match="found TensorDataset"):
        evaluate(data=dataset(4))
    with pytest.raises(DataError, match="found a dict with 'x'"):
        evaluate(data=[{"x": IMAGES}])
    with pytest.raises(DataError, match="iterable of batches"):
        evaluate(data=3)
    with pytest.warns(UserWarning, match="drop_last=True"):
        evaluate(data=DataLoader(dataset(5), 2, drop_last=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruptions": ("fogg",)}, "Did you mean 'fog'"),
        ({"corruptions": "fog"}, "sequence"),
        ({"corruptions": ()}, "not empty"),
        ({"corruptions": ("fog", "fog")}, "twice"),
        ({"severities": (0,)}, "severities must be an integer of at least 1, found 0"),
        ({"severities": (1, 6)}, "at most 5, found 6"),
        ({"severities": (2.0,)}, "an integer of at least 1, found 2.0"),
        ({"severities": 3}, r"Write \(3,\)"),
        ({"severities": ([1],)}, r"an integer of at least 1, found \[1\]"),
        ({"corruptions": (["fog"],)}, r"must be that of a corruption, found \['fog'\]"),
        ({"corruptions": (None,)}, "must be that of a corruption, found None"),
        ({"shifts": [1]}, "shifts must be a dict of data by name, found list"),
        ({"shifts": ()}, "found tuple"),
        ({"pixel_space": ((0.5,), (0.5,))}, r"pixel_space must be a PixelSpace or None, found \(\(0"),
        ({"pixel_space": ()}, "must be a PixelSpace"),
        ({"attacks": {"mine": lambda *_: None}}, r"attacks\['mine'\] must return .* returned NoneType"),
        ({"attacks": {"mine": lambda m, x, *_: x[:1]}}, r"\(4, 3, 32, 32\).* returned a tensor of shape \(1, 3"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        evaluate(**options)
