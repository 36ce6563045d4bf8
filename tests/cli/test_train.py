"""``entprop-train`` on tiny data: every kind of data, of model and of method."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file

from entprop_wrap import EntProp
from entprop_wrap.cli import data as data_parts
from entprop_wrap.cli import main, models, results
from entprop_wrap.cli import methods as method_parts
from entprop_wrap.cli import run as run_parts
from entprop_wrap.cli.options import METHODS, parse
from entprop_wrap.errors import ConfigurationError, EntPropError
from entprop_wrap.functional import uncertainty
from entprop_wrap.methods import MEADA, AdversarialTraining, AdvProp, EntropyAscent, FastAdvProp, MixProp, Vanilla
from entprop_wrap.methods.entropic_retraining import EntropicRetraining
from tests.faults.accidents import lines
from tests.helpers.image_samples import dark_and_light

ROOT = Path(__file__).parents[2]
QUICK = ["--epochs", "1", "--robustness-images", "4", "--severities", "3", "--batch-size", "8"]


@pytest.fixture
def train(capfd, monkeypatch):
    """Return a function that runs the command in this process; the page, which takes the longest, only if ``drawn``.

    It returns what was printed, and the error that it ended with if ``refused``.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    page = results.page

    def call(*arguments, output, drawn=False, refused=False):
        monkeypatch.setattr(results, "page", page if drawn else lambda *_: None)
        capfd.readouterr()
        code = 0
        try:
            main([*map(str, arguments), "--output", str(output)])
        except SystemExit as error:
            code = error.code
        printed = "".join(capfd.readouterr())
        assert bool(code) == refused, printed
        assert "Traceback" not in printed
        return code if isinstance(code, str) else printed

    return call


@pytest.fixture
def untrained(monkeypatch):
    """Fail where anything is trained."""
    monkeypatch.setattr(run_parts, "train", lambda *_: pytest.fail("trained"))


def built(*options, names):
    return method_parts.build(parse("", [*map(str, options), "--methods", *names]))


def runs(output):
    return {run["method"]: run for run in json.loads((output / "results.json").read_text())["runs"]}


@pytest.fixture
def folder(tmp_path):
    return dark_and_light(tmp_path / "images")


@pytest.fixture
def hub(tmp_path):
    """Return the folder of a small model as the Hub has it."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "hub")
    transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


def test_an_augmentation_is_for_training_images_only(train, tmp_path):
    arguments = (*QUICK, "--max-train", 40, "--methods", "vanilla")
    train(*arguments, output=tmp_path / "plain")
    train(*arguments, "--augment", "augmix", output=tmp_path / "aug")
    first, second = (runs(tmp_path / name)["vanilla"] for name in ("plain", "aug"))
    assert first != second


def test_digits_with_and_without_entprop(train, tmp_path):
    output = tmp_path / "out"
    done = train(*QUICK[:-2], "--max-train", 100, output=output, drawn=True)
    found = runs(output)
    for name in ("vanilla", "entprop"):
        assert f"\n| {name} | {100 * found[name]['sa']:.2f} | {100 * found[name]['ra']:.2f} |" in done
    assert re.search(r"Cost: vanilla \d+ seconds of training, 1.00 passes per step; entprop \d+ ", done)
    assert "\n| minus vanilla |" in done
    assert found["vanilla"]["passes_per_step"] == 1
    assert found["entprop"]["passes_per_step"] == pytest.approx(1 + 13 / 64, abs=0.01)
    for run in found.values():
        sa, ra = run["sa"], run["ra"]
        assert run["hscore"] == pytest.approx(2 * sa * ra / (sa + ra) if sa + ra else 0)
    assert "Hscore" in (output / "report.html").read_text()
    weights = load_file(output / "entprop-seed0" / "model" / "model.safetensors")
    assert not [key for key in weights if "entprop" in key]
    assert loaded(done, 10).keys() == weights.keys()


def loaded(printed, classes):
    """Run the three lines that end a run; return the state dict of the model that they load."""
    lines = printed.partition("in Python:")[2].strip().splitlines()
    namespace = {}
    exec("\n".join(lines[:3]), namespace)
    model = namespace["model"].eval()
    out = model(torch.zeros(2, 3, 160, 160))
    assert getattr(out, "logits", out).shape == (2, classes)
    return model.state_dict()


def test_an_image_folder_with_a_timm_model(train, tmp_path, folder):
    output = tmp_path / "out"
    arguments = ["--dataset", folder, "--model", "test_vit", "--image-size", 160]
    more = ["--set", "attack_steps=2", "fraction=0.5", "epsilon=4/255", "mix=cutmix", "--methods", "entprop"]
    done = train(*arguments, *more, *QUICK, output=output)
    assert runs(output)["entprop"]["passes_per_step"] == 2
    assert done.count("the 2 classes are the names of folders") == 1  # each note once
    loaded(done, 2)


@pytest.mark.parametrize(
    ("name", "pretrained"),
    [("shufflenet_v2_x0_5", False), ("shufflenet_v2_x0_5", True), ("squeezenet1_1", True), ("googlenet", True)],
)  # the head a linear layer, a convolution, and one of three
def test_models_of_torchvision(name, pretrained, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where torchvision finds what it has downloaded before
    published = torchvision.models.get_model(name)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    torch.save(published.state_dict(), tmp_path / "hub" / "checkpoints" / Path(url).name)
    found = models.find(parse("", ["--dataset", "any", "--model", name, *["--pretrained"] * pretrained]))
    model = found.build(("cat", "dog"))
    weights, published = model.state_dict(), published.state_dict()
    same = [key for key in weights if weights[key].ndim > 1 and torch.equal(weights[key], published[key])]
    assert len(same) == (sum(value.ndim > 1 for value in weights.values()) - 1 if pretrained else 0)
    save_file(weights, tmp_path / "model.safetensors")
    assert loaded("in Python:\n" + found.load.format(folder=tmp_path, classes=2) + "\n", 2).keys() == weights.keys()


@pytest.mark.parametrize(
    ("name", "size", "mean"),
    [
        ("efficientnet_v2_l", 480, 0.5),
        ("inception_v3", 299, 0.485),
        ("swin_v2_t", 256, 0.485),
        ("vit_h_14", 518, 0.485),
    ],
)
def test_images_are_as_published_weights_expect_them(name, size, mean):
    found = models.find(parse("", ["--dataset", "any", "--model", name]))
    assert (found.size, found.space.mean[0]) == (size, mean)


def test_published_weights_for_another_size_are_refused(monkeypatch):
    with torch.device("meta"):
        published = torchvision.models.vit_b_16().state_dict()
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: published)
        found = models.find(
            parse("", ["--dataset", "any", "--model", "vit_b_16", "--pretrained", "--image-size", "64"])
        )
        with pytest.raises(ConfigurationError, match=r"for images of 224 px, encoder\.pos_embedding has another shape"):
            found.build(("cat", "dog"))


def test_weights_stored_in_half_precision_are_trained_in_single(hub):
    transformers.AutoModelForImageClassification.from_pretrained(hub).bfloat16().save_pretrained(hub)
    for pretrained in (["--pretrained"], []):
        model = models.find(parse("", ["--dataset", "any", "--model", str(hub), *pretrained])).build(("a", "b"))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_dropout_of_a_wrong_conversion_is_repaired_with_a_note(hub, capsys):
    config = transformers.MobileNetV1Config(depth_multiplier=0.25, image_size=32, classifier_dropout_prob=0.999)
    transformers.MobileNetV1ForImageClassification(config).save_pretrained(hub)
    model = models.find(parse("", ["--dataset", "any", "--model", str(hub), "--pretrained"])).build(("a", "b"))
    assert "note: " in (printed := capsys.readouterr().out)
    assert "surely the share to keep" in printed
    assert model.dropout.p == pytest.approx(0.001)


@pytest.mark.usefixtures("untrained")
def test_digits_are_as_large_as_asked_for_and_as_the_model_takes(train, tmp_path):
    options = parse("", ["--image-size", "48"])
    assert data_parts.load(options, models.find(options).space, 48).test[0][0].shape == (3, 48, 48)
    found = train("--model", "vit_tiny_patch16_224", output=tmp_path / "out", refused=True)
    assert re.match(r"ConfigurationError: --model vit_tiny.* not take .* 32 px: .*[^.]\. Write --image-size 224", found)


def test_curves_and_table_are_of_the_same_images(train, tmp_path, folder):
    train("--dataset", folder, "--methods", "vanilla", *QUICK, output=tmp_path)
    (sa,) = {run["sa"] for run in runs(tmp_path).values()}
    assert [line["accuracy"] for line in lines(tmp_path / "vanilla-seed0", "eval")] == [sa]


def test_a_local_hub_model_and_resuming(train, tmp_path, folder, hub, monkeypatch):
    output = tmp_path / "out"
    arguments = ["--dataset", folder, "--model", hub, "--pretrained", "--in-memory", *QUICK]
    arguments += ["--linear-probe", "--interpolate", 0.25]
    diagnosed = []
    look = lambda name, method, model, *rest: diagnosed.append(copy.deepcopy(model.state_dict()))  # noqa: E731
    monkeypatch.setattr(results, "diagnose", lambda *args: look(*args) or {})
    first = train(*arguments, output=output)
    assert first.count("note: the fitted head alone has an accuracy of") == 1
    file = "entprop-seed0/model/model.safetensors"
    exported, began = load_file(output / file), load_file(hub / "model.safetensors")
    (checkpoint,) = (output / "entprop-seed0" / "checkpoints").glob("step-*")
    trained = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(value, diagnosed[0][name]) for name, value in trained.items())  # not on the way back
    for name in [n for n in exported if n in began and "classifier" not in n and began[n].is_floating_point()]:
        torch.testing.assert_close(exported[name], began[name].lerp(trained[name], 0.25))
    seconds = {name: run["seconds"] for name, run in runs(output).items()}
    again = train(*arguments, output=output, refused=True)
    assert f"{output}/vanilla-seed0 holds a run. Continue it with --resume, or choose another --output." in again
    other = train(*arguments[:-3], "--resume", output=output, refused=True)  # whose head was not fitted
    assert re.match("CheckpointError: .* began from other weights: .*'True'} there, .*'False'} here", other)
    train(*arguments, "--resume", output=output)
    assert all(torch.equal(value, exported[name]) for name, value in load_file(output / file).items())
    for name, run in runs(output).items():
        assert run["seconds"] >= seconds[name] > 0
    model = transformers.AutoModelForImageClassification.from_pretrained(output / "entprop-seed0" / "model")
    assert model.config.id2label == {0: "dark", 1: "light"}
    loaded(first, 2)


def test_ctrl_c_is_one_line_that_says_how_to_continue(train, tmp_path, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_parts, "run", interrupted)
    printed = train("--max-train", 100, output=tmp_path, refused=True)
    assert printed == f"\nInterrupted. To continue: entprop-train --max-train 100 --output {tmp_path} --resume\n"


def test_a_class_without_test_images_is_named(train, tmp_path, folder):
    place = tmp_path / "split"
    for index, image in enumerate(sorted(folder.rglob("*.png"))):
        target = place / ("validation" if index < 4 else "train") / image.parent.name
        target.mkdir(parents=True, exist_ok=True)
        image.rename(target / image.name)
    done = train("--dataset", place, "--methods", "vanilla", *QUICK, output=tmp_path / "out")
    assert "note: classes without images to evaluate on, so that nothing is known of them: 'light'" in done


def test_a_table_of_labels_by_the_name_of_its_column(train, tmp_path, folder):
    flat = tmp_path / "flat"
    flat.mkdir()
    rows = ["file_name,first,second"]
    for index, image in enumerate(sorted(folder.rglob("*.png"))):
        image.rename(flat / f"{index}.png")
        rows.append(f"{index}.png,{image.parent.name},{'ab'[index % 2]}")
    (flat / "metadata.csv").write_text("\n".join(rows) + "\n")
    arguments = ["--dataset", flat, "--methods", "vanilla", *QUICK]
    assert "label_column=" in train(*arguments, output=tmp_path / "a", refused=True)
    train(*arguments, "--label-column", "first", output=tmp_path / "b")


@pytest.mark.usefixtures("untrained")
def test_data_that_is_not_there(train, tmp_path, folder):
    def refused(name, *more):
        dataset = tmp_path / name if more else name
        found = train("--dataset", dataset, *more, *QUICK, output=tmp_path / "out", refused=True)
        assert found.startswith("DataError: ")
        assert not (tmp_path / "out").exists()
        return found

    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in refused("empty", "--seed", 1)
    assert "which is not a folder" in refused("images/dark/0.png", "--seed", 1)
    assert "--dataset imags: " in refused("imags")


def test_every_method_by_name(train, tmp_path, folder):
    output = tmp_path / "out"
    names = {
        "vanilla": 1,
        "label_smoothing": 1,
        "entropy_maximisation": 1,
        "entprop": 1.5,
        "random_selection": 1.5,
        "shared_norms": 1.5,
        "mixprop": 2,
        "advprop": 3,
        "fine_grained_advprop": 1 + 2 + 2,
        "fast_advprop": 1.5,
        "me_ada": 1 + 0.5 * (1 + 1),
        "me_ada_growth": 1,
        "pgd_at": 2,
        "trades": 3,
    }
    sizes = ["--dataset", folder, *QUICK, "--epochs", 3, "--set", "ascent.steps=1"]
    options = ["--set", "fraction=0.5", "attack_steps=1", "--equal-cost", "--methods", *names]
    train(*sizes, *options, output=output)
    found = runs(output)
    assert {name: run["passes_per_step"] for name, run in found.items()} == pytest.approx(names)
    for name in names:
        epochs = {"fast_advprop": 2, "me_ada_growth": 1}  # 3 / 1.5; the last of three phases
        assert lines(output / f"{name}-seed0")[-1]["epoch"] == epochs.get(name, 3), name
    for phase, steps in (("phase1", 1), ("phase2", 3), (".", 6)):  # 12 images, then 24, then 48
        assert lines(output / "me_ada_growth-seed0" / phase)[-1]["step"] == steps


def test_retraining_continues_from_trained_weights(train, tmp_path, folder):
    sizes = [*QUICK, "--dataset", folder]
    train(*sizes, "--methods", "vanilla", output=tmp_path)
    weights = tmp_path / "vanilla-seed0" / "model"
    still = ["--learning-rate", 1e-9, "--weight-decay", 0]
    train(*sizes, "--methods", "entropic_retraining", "--weights", weights, *still, output=tmp_path)
    before = load_file(weights / "model.safetensors")
    after = load_file(tmp_path / "entropic_retraining-seed0" / "model" / "model.safetensors")
    for key in ("0.weight", "1.weight", "14.weight"):
        torch.testing.assert_close(after[key], before[key])


@pytest.mark.usefixtures("untrained")
def test_weights_of_another_model_are_refused(train, tmp_path):
    for path in (tmp_path, tmp_path / "nothing.safetensors", Path(__file__)):
        found = train(*QUICK, "--weights", path, output=tmp_path / "out", refused=True)
        assert re.match(r"CheckpointError: --weights .*: expected the weights of this very model", found)
    save_file({"0.weight": torch.zeros(16, 3, 3, 3)}, tmp_path / "other.safetensors")
    found = train(*QUICK, "--weights", tmp_path / "other.safetensors", output=tmp_path / "out", refused=True)
    assert "Missing key(s)" in found


def test_attacks_and_seeds(train, tmp_path, folder):
    arguments = [*QUICK, "--dataset", folder, "--methods", "vanilla", "--seeds", 2, "--attack", "8/255"]
    printed = train(*arguments, output=tmp_path / "out")
    first, second = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert (first["seed"], second["seed"]) == (0, 1)
    assert "| method | SA | RA | Hscore | under PGD-20 8/255 |" in printed
    attacked = [100 * run["adversarial"]["PGD-20 8/255"]["accuracy"] for run in (first, second)]
    assert f"| {sum(attacked) / 2:.2f} ±" in printed


@pytest.mark.usefixtures("untrained")
def test_weights_that_cannot_be_downloaded_end_as_a_line(train, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    found = train(*QUICK, "--model", "squeezenet1_1", "--pretrained", output=tmp_path / "out", refused=True)
    assert "ConfigurationError: --model squeezenet1_1: its pretrained weights could not be loaded" in found
    assert "Name or service not known" in found


@pytest.mark.usefixtures("untrained")
def test_what_the_package_refuses_ends_as_a_line_before_anything_is_trained(train, tmp_path):
    for arguments, expected in (
        (["--attack", 8], "PixelRangeError: .*8/255"),
        (["--methods", "mixprop", "--set", "mix=none"], "ConfigurationError: mix must be a mixer"),
        (["--warmup", 2], "ConfigurationError: TrainerConfig: warmup must be"),
        (["--model", "resnot50"], "ConfigurationError: .*timm.list_models.*Did you mean 'resnet50'"),
        (["--model", "no/such"], "ConfigurationError: --model no/such is no local folder; as a Hub id"),
        (["--max-train", 5000], "DataError: --max-train of digits"),
        (["--epochs", 2, "--methods", "me_ada_growth"], "ConfigurationError: .*three phases, found 2 epochs"),
    ):
        assert re.match(expected, train(*QUICK, *arguments, output=tmp_path / "out", refused=True))
        assert not (tmp_path / "out").exists()


STRONG = AdvProp().attack.at(0.1)  # epsilon on the digits
HARD = AdversarialTraining().attack.at(0.1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["targeted=true", "attack_statistics=batch"], {"advprop": AdvProp(STRONG, True, "batch")}),
        (
            ["weight = 1/2"],
            {"advprop": AdvProp(STRONG, weight=0.5), "mixprop": MixProp(weight=0.5), "vanilla": Vanilla()},
        ),
        (["advprop.weight=0.5"], {"advprop": AdvProp(STRONG, weight=0.5), "mixprop": MixProp()}),
        (["uncertainty=logit_margin"], {"entprop": EntProp(epsilon=0.1, uncertainty=uncertainty.logit_margin)}),
        (
            ["lagged=true"],
            {"random_selection": EntProp(epsilon=0.1, uncertainty=uncertainty.random, lagged=True)},
        ),
        (["ascent.steps=3", "ascent.layer=none"], {"me_ada": MEADA(EntropyAscent(steps=3), fraction=0.2)}),
        (["shuffle=False", "beta=0.25"], {"fast_advprop": FastAdvProp(epsilon=0.1, shuffle=False, beta=0.25)}),
        (
            ["regularise=clean", "clean_weight=0.5"],
            {"pgd_at": AdversarialTraining(HARD, regularise="clean", clean_weight=0.5)},
        ),
        (["attack.norm=l2"], {"pgd_at": AdversarialTraining(replace(HARD, norm="l2"))}),
        (
            ["layers=1", "output_weight=-0.5"],
            {"entropic_retraining": EntropicRetraining(output_weight=-0.5, layers="1")},
        ),
        (["ascent.layer=14"], {"me_ada": MEADA(EntropyAscent(layer="14"), fraction=0.2)}),
    ],
)
def test_fields_that_have_no_flag(settings, expected):
    assert built("--weights", "any", "--set", *settings, names=expected) == expected


@pytest.mark.parametrize(
    ("names", "setting", "found"),
    [
        (["advprop"], "targeted", "expected NAME=VALUE"),
        (
            ["advprop"],
            "targetted=true",
            "no 'targetted' to set in advprop: attack.epsilon, attack.steps, attack.step_size,",
        ),
        (["advprop"], "attack=pgd", "no 'attack' to set in advprop: attack.epsilon,"),
        (["advprop"], "epsilon=tiny", "epsilon is a fraction of the full pixel range"),
        (["vanilla"], "targeted=true", "no 'targeted' to set in vanilla: nothing"),
        (["mixprop", "advprop"], "mixprop.targeted=true", "no 'targeted' to set in mixprop: mix, mix.alpha, weight"),
        (["advprop"], "targeted=maybe", "targeted must be True or False, found 'maybe'"),
        (["advprop"], "weight=1/0", "weight must be a number above 0, found '1/0'"),
        (["entprop"], "uncertainty=entropie", "one of ['entropy', 'least_confidence'"),
        (["entprop"], "mix=none mix.alpha=0.5", "--set mix.alpha: mix is None, which has no options"),
        (
            ["random_selection"],
            "uncertainty=entropy",
            "no 'uncertainty' to set",
        ),  # or it would not be what it is called
        (["trades"], "kind=pgd", "no 'kind' to set"),
        (["shared_norms"], "auxiliary=aux", "no 'auxiliary' to set"),
        (["entprop_finetuning"], "fraction=0.2", "no 'fraction' to set"),
    ],
)
def test_fields_that_cannot_be_set(names, setting, found):
    with pytest.raises(EntPropError, match=re.escape(found)):
        built("--set", *setting.split(), names=names)


def test_every_method_has_its_name_on_the_command_line():
    assert tuple(method_parts.METHODS) == METHODS


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("entprop_finetuning", ["lagged=true"], EntProp.finetuning(epsilon=0.1, lagged=True)),  # 0.1 on the digits
        ("entprop_finetuning", ["epsilon=4/255"], EntProp.finetuning(epsilon=4 / 255)),
        ("entprop_augmented", ["fraction=0.3"], EntProp.augmented(fraction=0.3, epsilon=0.1)),
        ("entprop_augmented", ["copies=all", "view=none"], EntProp.augmented(epsilon=0.1, copies="all", view=None)),
        ("entprop_augmented", ["view=augmix"], EntProp.augmented(epsilon=0.1, view="augmix")),
    ],
)
def test_presets_take_what_is_not_their_own(name, settings, expected):
    assert built("--set", *settings, names=[name]) == {name: expected}
