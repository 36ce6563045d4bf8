"""The report: one file that asks for nothing, shows what it was given, and shows it rightly."""

import base64
import importlib
import io
import math
import re
import stat
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import entprop_wrap as entprop
from entprop_wrap import diagnostics
from entprop_wrap.diagnostics import DomainGap, EntropyStages, Interval, LayerGap
from entprop_wrap.errors import ConfigurationError, EntPropError, ImageError, PixelRangeError
from entprop_wrap.reporting import report
from entprop_wrap.reporting.charts import Line, interval_chart, line_chart
from entprop_wrap.robustness import RobustnessResult, compare, corrupt, evaluate_robustness
from entprop_wrap.robustness.scores import Scores
from tests.helpers.small_classifier import SPACE, classifier, loader, pixels

CORRUPTIONS = ("fog", "gaussian_noise")
SEVERITIES = (1, 3, 5)
VOID = {"br", "img", "meta", "wbr"}
DASH = "\N{EN DASH}"


def result(seed, attack="PGD-20", shift="sketch", severities=SEVERITIES, images=1234, **changes):
    dice = torch.Generator().manual_seed(seed)

    def scores():
        return Scores(images, *torch.rand(4, generator=dice, dtype=torch.float64).tolist())

    found = {
        "clean": scores(),
        "corrupted": {(name, severity): scores() for name in CORRUPTIONS for severity in severities},
        "shifts": {shift: scores()},
        "adversarial": {attack: scores()},
    }
    return RobustnessResult(**{**found, **changes})


class Page(HTMLParser):
    """Elements of a page, checked for balance; tables by caption as lists of rows of text; text by class."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.tables, self.text, self.alerts = [], [], {}, [], []
        self.rows = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("class", "")))
        if tag == "table":
            self.rows, self.caption = [], ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "p":
            self.alerts.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag
        if tag == "table":
            assert self.caption not in self.tables
            self.tables[self.caption] = [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def handle_data(self, data):
        self.text.append(data)
        tags = [tag for tag, _ in self.open]
        if ("p", "alert") in self.open:
            self.alerts[-1] += data
        if "caption" in tags:
            self.caption += data
        elif "table" in tags and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    @property
    def words(self):
        return " ".join("".join(self.text).split())


def write(tmp_path, results, **options):
    path = report(results, tmp_path / "report.html", **options)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def percent(value):
    return f"{100 * value:.1f}"


def points(value):
    return "0.0" if percent(value) in ("0.0", "-0.0") else f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


SEEDS = {"vanilla": [result(0), result(1), result(2)], "EntProp": [result(3), result(4), result(5)]}
ONE = result(0)


def stages(perturbed, middle=0.5):
    names = ("clean", "mixed", "selected", "perturbed")
    return EntropyStages(
        values={name: (0.0, middle, math.log(10)) for name in names},
        stages={name: Interval(0.9, 0.8, 1.0) for name in names},
        changes={"mixed": Interval(0.4, 0.3, 0.5), "selected": Interval(0.7, 0.6, 0.8), "perturbed": perturbed},
        classes=10,
        batches=3,
    )


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A page on two models over three seeds, with all that compares them."""
    curves = {"EntProp": {0: 0.9, 0.5 / 255: 0.5, 4 / 255: 0.125}, "vanilla": {0: 0.8, 4 / 255: 0.0}}
    costs = {"vanilla": 1, "EntProp": 1.203}
    return write(tmp_path_factory.mktemp("several"), SEEDS, curves=curves, costs=costs, cost_name="passes")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A page on one result, with examples, diagnostics and facts."""
    layers = tuple(LayerGap(f"bn{i}", "BatchNorm2d", "aux", {"weight": 0.1 * i, "bias": 0.2}, 0.3) for i in range(3))
    found = {
        "EntProp: entropy": stages(Interval(-0.377, -0.496, -0.259)),
        "other": stages(Interval(0.2, 0.1, 0.3), 0.7),
        "Gap": DomainGap(layers),
    }
    return write(
        tmp_path_factory.mktemp("single"),
        ONE,
        images=pixels(2, side=40),
        diagnostics=found,
        warnings={"EntProp, seed 0, auxiliary loss": "It grows. Lower epsilon."},
        command="train --seeds 3",
        facts={"Commit": "abc123", "Seed": 3},
    )


# Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_and_differences_are_those_of_the_comparison(several):
    page, comparison = several[1], compare(SEEDS)
    head, *rows = page.tables["Scores in percent"]
    assert head[:6] == ["Model", "SA", "RA", "Hscore", "SA on sketch", "Under PGD-20"]
    assert [head[-1], *(row[-1] for row in rows)] == ["passes", "1", "1.203"]
    for key, heading in {"SA": "SA", "RA": "RA", "Hscore": "Hscore", "under PGD-20": "Under PGD-20"}.items():
        place = head.index(heading)
        plain, ours = (comparison.scores[name][key] for name in SEEDS)
        change = comparison.differences["EntProp"][key]
        assert rows[0][place] == f"{percent(plain.mean)} ± {percent(plain.half_width)}"
        assert rows[1][place].startswith(f"{percent(ours.mean)} ± {percent(ours.half_width)}")
        assert f"{points(change.mean)} ± {percent(change.half_width)}" in rows[1][place]
    for heading, get in {
        "Mean class accuracy": lambda r: r.clean.mean_class_accuracy,
        "Calibration error ↓": lambda r: r.clean.calibration_error,
        "Calibration error, corrupted ↓": lambda r: sum(s.calibration_error for s in r.corrupted.values()) / 6,
    }.items():
        cells = [row[head.index(heading)] for row in rows]
        for name, cell in zip(SEEDS, cells, strict=True):
            assert cell.split(" ± ")[0] == percent(sum(map(get, SEEDS[name])) / 3)
        change = sum(get(a) - get(b) for a, b in zip(SEEDS["EntProp"], SEEDS["vanilla"], strict=True)) / 3
        assert f"{points(change)} ±" in cells[1]


def test_the_best_of_a_column_is_bold_and_of_errors_the_smallest(several):
    rows = re.findall(r'<tr><th scope="row">(vanilla|EntProp)</th>(.*?)</tr>', several[0], re.DOTALL)[:2]
    bold = {name: ["<b>" in cell for cell in re.findall("<td>(.*?)</td>", row, re.DOTALL)] for name, row in rows}
    values = {
        name: [compare(SEEDS).scores[name]["SA"].mean, -sum(one.clean.calibration_error for one in SEEDS[name]) / 3]
        for name in SEEDS
    }
    for place, column in enumerate((0, -3)):
        best = max(values, key=lambda name: values[name][place])
        assert [name for name in bold if bold[name][column]] == [best]


def steady(shift, calibration=0.02):
    """Return three results whose scores differ between seeds alike for every shift."""
    return [
        RobustnessResult(
            Scores(335, 0.7 + shift + noise, 0.7, 1.0, calibration + noise),
            {("fog", 3): Scores(335, 0.4 + shift + noise, 0.4, 1.0, 0.1)},
        )
        for noise in (0.0, 0.02, 0.05)
    ]


@pytest.mark.parametrize(
    ("shift", "said"),
    [
        ([0.03, 0.031, 0.032], r"EntProp has the highest Hscore, .* points above plain \(95 % interval \+.* to \+"),
        ([0.03, -0.02, 0.01], "no evidence of a difference: the interval includes 0"),
        ([-0.03, -0.03, -0.031], "plain, the baseline, has the highest Hscore"),
    ],
)
def test_the_winner_comes_with_its_difference_and_what_that_is_worth(tmp_path, shift, said):
    ours = [steady(one)[seed] for seed, one in enumerate(shift)]
    text, page = write(tmp_path, {"plain": steady(0), "EntProp": ours})
    assert re.search(said, page.words)
    cards = re.findall(r'<div class="card"><h2>(.*?)</h2>(.*?)</div>', text, re.DOTALL)
    assert [name for name, _ in cards] == ["SA", "RA", "Hscore", "Calibration error"]
    if "baseline" in said:
        assert all("baseline" in card for _, card in cards)
        return
    change = compare({"plain": steady(0), "EntProp": ours}).differences["EntProp"]["SA"]
    assert f"{points(change.mean)} ± {percent(change.half_width)}" in cards[0][1]
    assert ('class="delta better"' in cards[0][1]) == (change.mean > change.half_width)


def test_a_calibration_error_that_rises_is_worse_and_drawn(tmp_path):
    ours = steady(0.03, calibration=0.094)
    text, page = write(tmp_path, {"plain": steady(0), "EntProp": ours})
    cell = page.tables["Scores in percent"][2][5]
    assert "+7.4 ± 0.0 (worse)" in cell
    head, *rows = page.tables["Calibration error by severity, in numbers"]
    assert head == ["severity", "plain", "EntProp"]
    assert rows == [["clean", "4.3", "11.7"], ["3", "10.0", "10.0"]]
    assert 'class="delta worse"' in text


@pytest.mark.parametrize(("images", "sa"), [(335, "70.0"), (10_000, "70.00")])
def test_decimals_are_as_many_as_the_images_are_worth(tmp_path, images, sa):
    scores = Scores(images, 0.7, 0.7, 1.0, 0.1)
    _, page = write(tmp_path, RobustnessResult(scores, {("fog", 3): scores}))
    assert page.tables["Scores in percent"][1][1] == sa
    assert page.tables["model: accuracy, %"][1][1] == sa


def test_one_result_needs_no_name_and_has_no_spread(single):
    text, page = single
    _, row = page.tables["Scores in percent"]
    assert row[:4] == ["model", percent(ONE.sa), percent(ONE.ra), percent(ONE.hscore)]
    assert "±" not in text
    assert not any("minus" in caption for caption in page.tables)
    assert ONE.protocol in page.words
    assert "not comparable" in text
    assert "a difference may be chance" in text


# Maps and charts ------------------------------------------------------------------------------------------------------


def test_heat_maps_hold_every_accuracy_and_its_means(several):
    page = several[1]

    def mean(name, condition):
        return sum(one.table[condition] for one in SEEDS[name]) / 3

    def expected(get, form):
        everything = []
        rows = [["severity", "1", "3", "5", "mean"]]
        for corruption in CORRUPTIONS:
            values = [get((corruption, severity)) for severity in SEVERITIES]
            everything.append(values)
            rows.append([corruption.replace("_", " "), *map(form, values), form(sum(values) / 3)])
        columns = [sum(column) / 2 for column in zip(*everything, strict=True)]
        return [*rows, ["mean", *map(form, columns), form(sum(columns) / 3)]]

    for name in SEEDS:
        assert page.tables[f"{name}: accuracy, %"] == expected(lambda c, name=name: mean(name, c), percent)
    change = expected(lambda c: mean("EntProp", c) - mean("vanilla", c), points)
    assert page.tables["EntProp minus vanilla: points"] == change


def test_charts_come_with_their_numbers(several):
    page = several[1]
    head, *rows = page.tables["Accuracy by severity, in numbers"]
    assert head == ["severity", "vanilla", "EntProp"]
    comparison = compare(SEEDS)
    assert rows[0] == ["clean", *(percent(comparison.scores[name]["SA"].mean) for name in SEEDS)]
    for row, severity in zip(rows[1:], SEVERITIES, strict=True):
        means = [sum(one.per_severity[severity] for one in SEEDS[name]) / 3 for name in SEEDS]
        assert row == [str(severity), *map(percent, means)]
    assert page.tables["Accuracy against epsilon, in numbers"][1:] == [
        ["0", "80.0", "90.0"],
        ["0.5", DASH, "50.0"],
        ["4", "0.0", "12.5"],
    ]
    hscores = {name: percent(comparison.scores[name]["Hscore"].mean) for name in SEEDS}
    rows = page.tables["Hscore against passes, in numbers"][1:]
    assert rows == [["1", hscores["vanilla"], DASH], ["1.203", DASH, hscores["EntProp"]]]


def places(svg):
    """Return the markers of a drawing, as (x, y), and its whole elements."""
    root = ElementTree.fromstring(svg)
    return [
        (float(one.get("x")), float(one.get("y"))) for one in root.iter("use") if "--card" in one.get("style")
    ], root


def test_points_are_drawn_where_their_numbers_are():
    drawn = line_chart("t", [Line("a", [0, 5, 10], [0.0, 50.0, 100.0], [None, 25.0, None])], "x", "y")
    (first, middle, last), root = places(drawn.svg)
    assert middle == pytest.approx(((first[0] + last[0]) / 2, (first[1] + last[1]) / 2), abs=0.01)
    assert first[0] < last[0]
    assert first[1] > last[1]
    heights = [re.findall(r"[\d.]+", one.get("d")) for one in root.iter("path") if "1.2;" in one.get("style", "")]
    (bar,) = [abs(float(numbers[1]) - float(numbers[3])) for numbers in heights]
    assert bar == pytest.approx((first[1] - last[1]) / 2, rel=0.01)


def test_drawings_take_the_colours_of_the_page_and_names_as_they_are():
    name = 'a $x^ id="b" #0000c0 <i> & \x01'
    with matplotlib.rc_context({"axes.facecolor": "red", "svg.fonttype": "path"}):
        drawn = interval_chart(f"t{name}", [Line("a", range(1), [1.0], [0.5])], [name], "points", "")
    assert not re.search(r"#(?!0000c0)[0-9a-f]{6}|red", drawn.svg)
    assert {"var(--c0)", "var(--soft)", "var(--rule)"} <= set(re.findall(r"var\(--\w+\)", drawn.svg))
    root = ElementTree.fromstring(drawn.svg)
    assert name[:-1] in [one.text for one in root.iter("text")]
    assert root.get("role") == "img"
    assert name[:-1] in root.get("aria-label")


# The page -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["several", "single"])
def test_the_page_asks_for_nothing_and_is_for_everyone(which, request):
    text, page = request.getfixturevalue(which)
    bare = re.sub("data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//|@import|url\((?!#)|<script|<link|javascript", bare)
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    assert all(link.startswith("#") for link in links)  # the marks of drawings
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    assert {link[1:] for link in links} <= set(names)
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert (sources != []) == (which == "single")
    assert all(one.startswith("data:image/png;base64,") for one in sources)
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert ("html", {"lang": "en"}) in page.tags
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    counts = [sum(tag == one for tag, _ in page.tags) for one in ("table", "caption")]
    scrolls = [a for _, a in page.tags if a.get("class", "").startswith("scroll")]
    assert counts[0] == counts[1] == len(scrolls)
    assert all(one["tabindex"] == "0" and one["aria-label"] for one in scrolls)
    for need in ("prefers-color-scheme: dark", "@media print", "max-width: 720px"):
        assert need in text


def test_names_break_at_their_separators_only(tmp_path):
    text, _ = write(tmp_path, {"entprop_finetuning": result(0)})
    assert '<th scope="row">entprop_<wbr>finetuning</th>' in text
    assert "overflow-wrap: anywhere" not in re.search(r"tbody th \{.*?\}", text)[0]


@pytest.mark.parametrize("number", [1, 4, 5])
def test_every_row_is_full(tmp_path, number):
    text, _ = write(tmp_path, {f"m{n}": result(n) for n in range(number)})
    spans = {"third": 2, "half": 3, "whole": 6}
    for grid in re.findall(r'<div class="grid">(.*?)</section>', text, re.DOTALL):
        filled = 0
        for one in re.findall(r'class="(?:chart |scroll )?(third|half|whole)"', grid):
            filled = filled % 6 + spans[one]
            assert filled <= 6
        assert filled % 6 == 0


def test_every_string_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>&\"<img src=x onerror=y>"
    attack, shift = f"a{evil}", f"s{evil}"
    names = {f"m{evil}": result(0, attack, shift), f"n{evil}": result(2, attack, shift)}
    text, page = write(
        tmp_path,
        names,
        title=f"t{evil}",
        costs=dict.fromkeys(names, 1),
        cost_name=f"c{evil}",
        curves={name: {0: 1.0, 0.1: 0.0} for name in names},
        diagnostics={f"g{evil}": DomainGap((LayerGap(f"l{evil}", f"k{evil}", "x", {f"p{evil}": 0.1}, None),))},
        warnings={f"w{evil}": f"u{evil}"},
        command=f"run {evil}",
        facts={f"f{evil}": f"v{evil}"},
    )
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img"}
    assert all("onerror" not in attributes for _, attributes in page.tags)
    shown = "".join(page.text)
    for letter in "tmnascgfvlpwuk":
        assert f"{letter}{evil}" in shown, letter
    assert f"run {evil}" in shown
    assert "{{" not in text


def test_names_in_other_scripts_and_long_ones_are_shown(tmp_path, recwarn):
    names = {"猫 🐈 ü": result(0), "x" * 300: result(1)}
    _, page = write(tmp_path, names, facts={"a\u2028": "b\x07"})
    assert all(name in "".join(page.text) for name in names)
    assert not [one for one in recwarn if "Glyph" in str(one.message)]


def test_versions_command_and_facts_are_told(single):
    text, _ = single
    assert "<code>train --seeds 3</code>" in text
    for name, value in {"Seed": 3, "Commit": "abc123", "torch": torch.__version__}.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in text
    assert "UTC" in text


def test_what_an_evaluation_returns_is_taken(tmp_path):
    models = {"a": classifier(0), "b": classifier(1)}
    options = {"pixel_space": SPACE, "corruptions": ["fog"], "severities": [2], "progress": False}
    found = evaluate_robustness(models, loader(6), **options)
    images, _ = next(iter(loader(6)))
    _, page = write(tmp_path, found, images=images, pixel_space=SPACE)
    assert page.tables["a: accuracy, %"][1] == ["fog", percent(found["a"].ra), percent(found["a"].ra)]


# Pictures -------------------------------------------------------------------------------------------------------------


def test_examples_are_corrupted_at_full_size_and_take_turns(single):
    images = pixels(2, side=40)
    sources = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', single[0])
    assert len(sources) == 2 * 4
    for number, name in enumerate(CORRUPTIONS):
        one = images[number]
        changed = [corrupt(one[None], name, at, torch.Generator().manual_seed(0))[0] for at in SEVERITIES]
        for (source, alt), image in zip(sources[4 * number :], [one, *changed], strict=False):
            shown = torch.tensor(np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))).permute(2, 0, 1)
            assert torch.equal(shown, image.mul(255).round().byte()), alt
    assert sources[5][1] == "gaussian noise, severity 1"


def test_large_examples_are_shrunk_and_that_is_said(tmp_path):
    text, page = write(tmp_path, result(0), images=pixels(1, side=200))
    sizes = {(a["width"], a["height"]) for tag, a in page.tags if tag == "img"}
    assert sizes == {("128", "128")}
    assert "200 x 200 px, shown at 128 px" in text


# Diagnostics ----------------------------------------------------------------------------------------------------------


def test_diagnostics_are_explained(single):
    _, page = single
    monitor, alert = [one for one in page.alerts if one]
    assert monitor == "EntProp, seed 0, auxiliary loss: It grows. Lower epsilon."
    assert "'perturbed' does not raise entropy beyond chance: it changes by -0.377 [-0.496, -0.259] nats" in alert
    assert page.words.count("Here every stage is.") == 1
    assert page.tables["other: mean entropy"] == [
        ["stage", "images", "entropy, nats", "change"],
        ["clean", "3", "0.9 [0.8, 1]", ""],
        ["mixed", "3", "0.9 [0.8, 1]", "0.4 [0.3, 0.5]"],
        ["selected", "3", "0.9 [0.8, 1]", "0.7 [0.6, 0.8]"],
        ["perturbed", "3", "0.9 [0.8, 1]", "0.2 [0.1, 0.3]"],
    ]
    assert page.tables["Gap: distance by layer"][3] == ["bn2", "BatchNorm2d", "aux", "0.2", "0.2", "0.3"]
    assert "weight 0.2 in layer 'bn2'" in page.words
    assert "All of it is small" not in page.words


def test_a_stage_has_one_colour_in_every_picture(tmp_path):
    whole = stages(Interval(0.2))
    parts = {name: value for name, value in whole.values.items() if name != "mixed"}
    unmixed = EntropyStages(parts, {n: whole.stages[n] for n in parts}, {}, 10, 3)
    text, _ = write(tmp_path, result(0), diagnostics={"a": whole, "b": unmixed})
    drawn = [one for one in re.findall("<svg.*?</svg>", text, re.DOTALL) if "Entropy by stage" in one]
    colours = [[*dict.fromkeys(re.findall(r"fill: var\(--(c\d)\)", one))] for one in drawn]
    assert colours[0] == [colours[1][0], colours[0][1], *colours[1][1:]]
    assert not {"c0", "c1", "c2"} & set(colours[0])  # the first models


@pytest.mark.filterwarnings("ignore:The stage")
def test_real_diagnostics_are_taken_and_explained(tmp_path):
    model = entprop.wrap(classifier())
    with torch.no_grad():
        model[1].weight.mul_(1.5)
    options = {"pixel_space": SPACE, "progress": False}
    found = {
        "Entropies": diagnostics.entropy_stages(model, loader(12, 6), **options),
        "Gap": diagnostics.domain_gap(model),
        "Jacobian": diagnostics.input_jacobian(model, loader(4), **options),
    }
    text, page = write(tmp_path, result(0), diagnostics=found)
    assert [row[0] for row in page.tables["Entropies: mean entropy"][1:]] == list(found["Entropies"].stages)
    ((_, frobenius, spectral),) = page.tables["Input Jacobian, mean over images"][1:]
    assert frobenius.startswith(f"{found['Jacobian'].frobenius_mean.value:.3g}")
    assert spectral.startswith(f"{found['Jacobian'].spectral_mean.value:.3g}")
    panels = re.findall(r'<div class="panel">(.*?)</div></div>', text, re.DOTALL)
    assert len(panels) == 3
    assert all(len(re.sub("<.*?>", "", one)) > 150 for one in panels)


def test_norms_of_which_nothing_is_copied_have_no_gap(tmp_path):
    model = entprop.wrap(nn.Sequential(nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3)), copies="statistics")
    text, _ = write(tmp_path, result(0), diagnostics={"Gap": diagnostics.domain_gap(model)})
    assert "share all tensors of the norm layers" in text


# Files and bad input --------------------------------------------------------------------------------------------------


def test_the_example_of_the_docs_is_of_its_command_and_of_this_template():
    docs = Path(__file__).parents[2] / "docs"
    page, shown = (docs / "report-digits.html").read_text(), (docs / "reports.md").read_text()
    (options,) = re.findall(r"^entprop-train (.*)$", shown, re.MULTILINE)
    assert f"train.py {options}</code>" in page  # the same command by its other name
    template = (Path(entprop.__file__).parent / "reporting" / "report.html").read_text()
    style = re.compile("<style>.*</style>", re.DOTALL)
    assert style.search(page)[0] == style.search(template)[0]
    assert {"vanilla", "entprop", "entprop_finetuning"} <= set(re.findall(r"<th[^>]*>([a-z_]+)</th>", page))


def test_the_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "report.html"
    assert report(result(0), path) == path
    before = path.read_text(encoding="utf-8")
    with pytest.raises(ConfigurationError):
        report(result(0), path, costs={"x": 1})
    assert path.read_text(encoding="utf-8") == before
    report(result(1), str(path), title="new")
    assert "<title>new</title>" in path.read_text(encoding="utf-8")
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "other").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        *(
            (bad, "path must be a file such as 'report.html'")
            for bad in (None, 3, b"report.html", "report", "x" * 2000)
        ),
        ("x.md", r"found 'x\.md'\. For Markdown use model_card"),
        ("a\0.html", "cannot be written"),
        ("file/x.html", "cannot be written"),
        ("folder.html", "cannot be written"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder.html").mkdir()
    with pytest.raises(ConfigurationError, match=message):
        report(result(0), path)
    assert {one.name for one in tmp_path.iterdir()} == {"file", "folder.html"}


@pytest.mark.parametrize(
    ("results", "options", "error", "message"),
    [
        ({}, {}, ConfigurationError, "same number of results, one per seed"),
        ({"a": 3}, {}, ConfigurationError, "'a', found int"),
        ({3: result(0)}, {}, ConfigurationError, "a dict of results by name, found {3"),
        ({"a": result(0), "b": [result(1), result(2)]}, {}, ConfigurationError, "same number of results, one per seed"),
        ({"a": result(0), "b": result(1, severities=(1,))}, {}, ConfigurationError, "one protocol"),
        (result(0), {"costs": {"EntProp": 1}}, ConfigurationError, "costs names 'EntProp'.*'model'"),
        (result(0), {"costs": {"model": math.nan}}, ConfigurationError, "finite"),
        (result(0), {"costs": 3}, ConfigurationError, "costs must be a dict"),
        (result(0), {"curves": {"model": {0: 90.0}}}, ConfigurationError, r"\[0, 1\]"),
        (result(0), {"curves": {"model": {"4/255": 0.9}}}, ConfigurationError, "by epsilon"),
        (result(0), {"curves": {0: 0.9}}, ConfigurationError, "curves must be a dict of curves by name, found"),
        (result(0), {"title": None}, ConfigurationError, "title must be text"),
        (result(0), {"title": "\ud800"}, ConfigurationError, "title must be text"),
        (result(0), {"facts": {3: "Seed"}}, ConfigurationError, "facts must be a dict of texts by name, found"),
        (result(0), {"facts": {"Seed": "\ud800"}}, ConfigurationError, "cannot be written"),
        (result(0), {"diagnostics": {"x": 3}}, ConfigurationError, r"diagnostics\['x'\].*found int"),
        (result(0), {"images": "cat.png"}, ImageError, "tensor"),
        (result(0), {"images": torch.rand(1, 1, 40, 40)}, EntPropError, "channel"),
        (result(0), {"images": torch.rand(1, 3, 8, 8)}, ImageError, "32"),
        (result(0), {"images": torch.randn(1, 3, 40, 40)}, PixelRangeError, "0"),
        (result(0), {"images": pixels(1), "pixel_space": 3}, ConfigurationError, "pixel_space"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(tmp_path, results, options, error, message):
    with pytest.raises(error, match=message):
        report(results, tmp_path / "report.html", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib", "huggingface_hub"])
def test_without_the_extra_the_error_names_it(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "entprop_wrap.reporting")
    with pytest.raises(ImportError, match=rf"need {missing}, which is missing: pip install \"entprop-wrap\[report\]\""):
        importlib.import_module("entprop_wrap.reporting")
