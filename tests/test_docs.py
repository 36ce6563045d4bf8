"""Every Python block of the README and the docs runs, in order, as it stands; and the examples do what they say."""

import functools
import os
import re
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

import entprop_wrap as entprop
from entprop_wrap.finetuning import repair_keep_probabilities
from entprop_wrap.functional.attacks import PGD
from entprop_wrap.methods import AdvProp

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
CLASSES = 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step"),
    pytest.mark.xdist_group("docs"),  # so that one worker runs each page, once
]


class Net(nn.Module):
    """A classifier as torchvision's are, but tiny."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, pixels):
        return self.fc(F.relu(self.bn(self.conv(pixels))).mean((2, 3)))


class Pictures(Dataset):
    """Random images, darker or brighter by class, in [0, 1]."""

    def __init__(self, number, seed):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(number) % CLASSES
        shades = (self.labels / CLASSES).view(-1, 1, 1, 1)
        self.images = (0.75 * torch.rand(number, 3, 32, 32, generator=generator) + 0.25 * shades).clamp(0, 1)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])


def blocks(page):
    """(line, source) of each Python block."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield text.count("\n", 0, match.start(1)) + 1, match[1]


def name_of(page):
    return str(page.relative_to(ROOT))


def run(page, folder):
    """Execute a page's blocks from top to bottom in an empty folder and an empty namespace, and return the latter."""
    torch.manual_seed(0)
    namespace = {"__name__": "page"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for line, source in blocks(page):
            # so that a traceback shows the page and its line
            exec(compile("\n" * (line - 1) + source, str(page), "exec"), namespace)
    finally:
        os.chdir(before)
    return {**namespace, "folder": folder}


@pytest.fixture(scope="module")
def after(tmp_path_factory):
    """Return a function that runs a page, once, and returns its namespace."""
    return functools.cache(lambda page: run(page, tmp_path_factory.mktemp("page")))


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=name_of)
def test_a_page_runs(page, after):
    after(page)


def test_there_are_blocks_to_run():
    counts = {name_of(page): len(list(blocks(page))) for page in PAGES}
    assert counts["README.md"] >= 3
    assert counts["docs/extending.md"] >= 7


# The readme -----------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


def test_the_methods_that_the_readme_names_are_where_it_says():
    sentence = re.search(r"`from entprop_wrap.methods import AdvProp`[^.]*", (ROOT / "README.md").read_text())[0]
    names = re.findall(r"`([A-Z]\w+)`", sentence)
    assert len(names) == 5
    exec(f"from entprop_wrap.methods import AdvProp, {', '.join(names)}", {})


def test_the_readme_prints_what_its_comments_say(after):
    page, text = after(ROOT / "README.md"), (ROOT / "README.md").read_text()
    assert f"# {', '.join(page['out'].metrics())}\n" in text
    summary = entprop.summary(entprop.wrap(torchvision.models.resnet18(num_classes=4)))
    assert f"print(entprop.summary(model))  # {summary}\n" in text


def test_the_extras_of_the_readme_are_those_of_the_package():
    names = re.search(r"the extras are ([^.]*)\.", (ROOT / "README.md").read_text())[1]
    assert {*re.findall("`([a-z]+)`", names), "dev", "docs"} == set(metadata("entprop-wrap").get_all("Provides-Extra"))


def test_the_readme_saves_plain_models(after):
    page = after(ROOT / "README.md")
    plain, found = type(page["hf_trainer"].model).from_pretrained(
        page["folder"] / "runs" / "plain", output_loading_info=True
    )
    assert not found["unexpected_keys"]
    assert not found["missing_keys"]
    assert plain.config.id2label == page["data"].id2label
    fresh = torchvision.models.resnet18(num_classes=4)
    fresh.load_state_dict(torch.load(page["folder"] / "model.pt"))
    fresh.load_state_dict(load_file(page["folder"] / "runs" / "trainer" / "model" / "model.safetensors"))


def test_the_readme_holds_out_a_fifth_of_every_class(after):
    data = after(ROOT / "README.md")["data"]
    assert len(data.classes) == 4
    assert torch.bincount(data.eval.labels).tolist() == [3] * 4
    assert "held out" in data.notes[-1]


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{name_of(page)}: {target}"


# The other pages ------------------------------------------------------------------------------------------------------


def test_what_is_saved_half_way_back_is_plain(after):
    page = after(ROOT / "docs" / "huggingface.md")
    saved = load_file(page["folder"] / "runs" / "halfway" / "model.safetensors")
    assert saved.keys() == page["start"].keys()
    assert not torch.equal(saved["classifier.1.weight"], page["start"]["classifier.1.weight"])


def test_the_mixing_trainer_mixes_training_images_only(after):
    trainer = after(ROOT / "docs" / "huggingface.md")["mixing_trainer"]
    trainer.create_accelerator_and_postprocess()  # another test may have reset what all accelerators share
    assert next(iter(trainer.get_train_dataloader()))["labels"].shape[1:] == (4,)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"]
    assert first["eval_accuracy"] == second["eval_accuracy"]


def test_the_mobilenet_of_the_docs_is_repaired(after):
    model = after(ROOT / "docs" / "huggingface.md")["mobilenet"]
    assert model.dropout.p == pytest.approx(0.001)
    assert repair_keep_probabilities(model) == []
    assert all(module.momentum == 0.1 for module in model.modules() if isinstance(module, nn.BatchNorm2d))


# The examples of docs/extending.md ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(after):
    return after(ROOT / "docs" / "extending.md")


def gradients_of(method, **options):
    torch.manual_seed(0)
    model = entprop.wrap(Net().double())
    images, labels = Pictures(20, seed=3).images.double(), Pictures(20, seed=3).labels
    out = entprop.training_step(model, images, labels, method=method, **options)
    return out, {name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())


def test_the_method_of_the_docs_is_advprop_where_it_selects_every_image(examples):
    attack = PGD(epsilon=4 / 255, steps=5, step_size=1 / 255, random_start=False)
    ours = gradients_of(examples["SelectiveAdvProp"](fraction=1.0, attack=attack))
    theirs = gradients_of(AdvProp(attack=attack, attack_statistics="batch"))
    assert ours[0].passes == theirs[0].passes
    assert sorted(ours[0].selected.tolist()) == list(range(20))
    for found, expected in zip(ours[1:], theirs[1:], strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_the_method_of_the_docs_is_as_short_as_it_says():
    (source,) = [text for _, text in blocks(ROOT / "docs" / "extending.md") if "class SelectiveAdvProp(" in text]
    assert len(source.splitlines()) < 60


def test_the_method_of_the_docs_costs_what_the_paper_says(examples):
    assert gradients_of(examples["SelectiveAdvProp"]())[0].passes == pytest.approx(4.6)  # EntProp, table 15


def test_the_diverging_attack_of_the_docs_moves_predictions(examples):
    pgd = PGD(epsilon=16 / 255, steps=5, step_size=4 / 255)
    out = gradients_of(examples["DivergingAdvProp"](fraction=0.5, attack=pgd))[0]
    images = Pictures(20, seed=3).images.double()[out.selected]
    assert 0 < (out.aux_images - images).abs().max() <= 16 / 255 + 1e-12
    assert not torch.equal(out.aux_images, gradients_of(examples["SelectiveAdvProp"](0.5, pgd))[0].aux_images)


def test_the_mixer_of_the_docs_joins_two_halves(examples):
    images = Pictures(6, seed=4).images[..., :7]
    mix = examples["Halves"]().draw(images.shape, torch.Generator().manual_seed(0))
    mixed = mix.apply(images)
    assert mix.share == 3 / 7
    assert torch.equal(mixed[..., :3], images[..., :3])
    assert torch.equal(mixed[..., 3:], images[mix.partner][..., 3:])


@pytest.mark.parametrize("name", ["MomentumAttack", "Noise"])
def test_the_attacks_of_the_docs_stay_in_their_ball(examples, name):
    attack = examples[name](epsilon=8 / 255)
    out = gradients_of(AdvProp(attack=attack))[0]
    images = Pictures(20, seed=3).images.double()
    assert 4 / 255 < (out.aux_images - images).abs().max() <= 8 / 255 + 1e-12
    assert out.aux_images.min() >= 0
    assert out.aux_images.max() <= 1
    assert out.passes == 2 + attack.steps


def test_the_momentum_attack_of_the_docs_raises_the_loss(examples):
    with_noise, attacked = (
        gradients_of(AdvProp(attack=examples[name](epsilon=16 / 255)))[0].aux_loss
        for name in ("Noise", "MomentumAttack")
    )
    assert attacked > with_noise


def test_the_score_of_the_docs_is_highest_where_two_classes_are_close(examples):
    logits = torch.tensor([[3.0, 0.0, 0.0], [3.0, 2.9, 0.0], [0.0, 1.0, 3.0]])
    assert examples["rivalry"](logits, None).argmax() == 1
