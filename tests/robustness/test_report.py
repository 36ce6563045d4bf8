"""The report: one file that asks for nothing, shows what it was given, and shows it rightly."""

import base64
import io
import itertools
import math
import re
import stat
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import entprop_wrap as entprop
from entprop_wrap import diagnostics
from entprop_wrap.errors import ConfigurationError, ImageError, PixelRangeError
from entprop_wrap.robustness import RobustnessResult, compare, corrupt, evaluate_robustness, report
from entprop_wrap.robustness.reporting.charts import Axis, Series, chart, ticks_between
from entprop_wrap.robustness.reporting.pictures import png
from entprop_wrap.robustness.scores import Scores

from .small import SPACE, classifier, loader, pixels

CORRUPTIONS = ("fog", "gaussian_noise")
SEVERITIES = (1, 3, 5)
VOID = {"br", "circle", "col", "img", "line", "meta", "path", "polyline", "rect"}


def result(seed, attack="PGD-20", shift="sketch", conditions=CORRUPTIONS, severities=SEVERITIES, auxiliaries=None):
    dice = torch.Generator().manual_seed(seed)

    def scores():
        values = torch.rand(4, generator=dice, dtype=torch.float64).tolist()
        return Scores(1234, *values)

    return RobustnessResult(
        clean=scores(),
        corrupted={(name, severity): scores() for name in conditions for severity in severities},
        shifts={shift: scores()},
        adversarial={attack: scores()},
        auxiliaries=auxiliaries or {},
    )


class Page(HTMLParser):
    """Elements of a page, checked for balance; tables as lists of rows of text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.tables, self.text = [], [], {}, []
        self.rows = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows, self.caption = [], ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            assert self.caption not in self.tables
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        self.text.append(data)
        if "caption" in self.open:
            self.caption += data
        elif "table" in self.open and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def write(tmp_path, results, **options):
    path = report(results, tmp_path / "report.html", **options)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def percent(value):
    return f"{100 * value:.2f}"


def points(value):
    return "0.00" if percent(value) in ("0.00", "-0.00") else f"{100 * value:+.2f}".replace("-", "\N{MINUS SIGN}")


@pytest.fixture
def seeds():
    return {"vanilla": [result(0), result(1), result(2)], "EntProp": [result(3), result(4), result(5)]}


def test_scores_and_differences_are_those_of_the_comparison(tmp_path, seeds):
    _, page = write(tmp_path, seeds, costs={"vanilla": 1, "EntProp": 1.203}, cost_name="passes")
    comparison = compare(seeds)
    head, *rows = page.tables["Scores in percent"]
    assert head[:6] == ["Model", "SA", "RA", "Hscore", "Under PGD-20", "SA on sketch"]
    assert head[-1] == "passes"
    assert [row[-1] for row in rows] == ["1", "1.203"]
    change_head, *changes = page.tables["Differences to vanilla, in percentage points"]
    assert [row[0] for row in changes] == ["EntProp"]
    keys = ["SA", "RA", "Hscore", "under PGD-20", "SA on sketch"]
    for name, row in zip(seeds, rows, strict=True):
        for key, cell in zip(keys, row[1:], strict=False):
            value = comparison.scores[name][key]
            assert cell == f"{percent(value.mean)} ± {percent(value.half_width)}"
    for key, cell in zip(keys, changes[0][1:], strict=False):
        value = comparison.differences["EntProp"][key]
        assert cell == f"{points(value.mean)} ± {percent(value.half_width)}"
    for column, get in {
        "Mean class accuracy": lambda r: r.clean.mean_class_accuracy,
        "Calibration error": lambda r: r.clean.calibration_error,
        "Calibration error, corrupted": lambda r: sum(s.calibration_error for s in r.corrupted.values()) / 6,
    }.items():
        for name, row in zip(seeds, rows, strict=True):
            mean = sum(map(get, seeds[name])) / 3
            assert row[head.index(column)].split(" ± ")[0] == percent(mean)
        change = sum(get(a) - get(b) for a, b in zip(seeds["EntProp"], seeds["vanilla"], strict=True)) / 3
        assert changes[0][change_head.index(column)].split(" ± ")[0] == points(change)


def test_the_best_of_a_column_is_bold_and_of_errors_the_smallest(tmp_path, seeds):
    text, _ = write(tmp_path, seeds)
    rows = re.findall(r'<tr><th scope="row">(vanilla|EntProp)</th>(.*?)</tr>', text)[:2]
    bold = {name: ["<b>" in cell for cell in re.findall("<td>(.*?)</td>", row)] for name, row in rows}
    values = {
        name: [
            compare(seeds).scores[name]["SA"].mean,
            -sum(one.calibration_error for one in seeds[name]) / 3,
        ]
        for name in seeds
    }
    for place, column in enumerate((0, -2)):
        best = max(values, key=lambda name: values[name][place])
        assert [name for name in bold if bold[name][column]] == [best]


def test_heat_maps_hold_every_accuracy_and_its_means(tmp_path, seeds):
    _, page = write(tmp_path, seeds)

    def mean(name, condition):
        return sum(one.table[condition] for one in seeds[name]) / 3

    def expected(get, form):
        everything = []
        rows = [["Severity", "1", "3", "5", "mean"]]
        for corruption in CORRUPTIONS:
            values = [get((corruption, severity)) for severity in SEVERITIES]
            everything.append(values)
            rows.append([corruption.replace("_", " "), *map(form, values), form(sum(values) / 3)])
        columns = [sum(column) / 2 for column in zip(*everything, strict=True)]
        return [*rows, ["mean", *map(form, columns), form(sum(columns) / 3)]]

    for name in seeds:
        assert page.tables[f"{name}: accuracy, %"] == expected(lambda c, name=name: mean(name, c), percent)
    change = expected(lambda c: mean("EntProp", c) - mean("vanilla", c), points)
    assert page.tables["EntProp minus vanilla: percentage points"] == change


def test_charts_come_with_their_numbers(tmp_path, seeds):
    curves = {"EntProp": {0: 0.9, 0.5 / 255: 0.5, 4 / 255: 0.125}, "vanilla": {0: 0.8, 4 / 255: 0.0}}
    _, page = write(tmp_path, seeds, curves=curves, costs={"EntProp": 1.2, "vanilla": 1.0}, cost_name="passes")
    head, *rows = page.tables["Accuracy by severity: accuracy, %"]
    assert head == ["severity (0: images as they are)", "vanilla", "EntProp"]
    comparison = compare(seeds)
    assert rows[0] == ["0", *(percent(comparison.scores[name]["SA"].mean) for name in seeds)]
    for row, severity in zip(rows[1:], SEVERITIES, strict=True):
        means = [sum(one.per_severity[severity] for one in seeds[name]) / 3 for name in seeds]
        assert row == [str(severity), *map(percent, means)]
    dash = "\N{EN DASH}"
    assert page.tables["Accuracy against epsilon: accuracy, %"][1:] == [
        ["0", "80.00", "90.00"],
        ["0.5", dash, "50.00"],
        ["4", "0.00", "12.50"],
    ]
    hscores = {name: percent(comparison.scores[name]["Hscore"].mean) for name in seeds}
    assert page.tables["Hscore against passes: Hscore, %"][1:] == [
        ["1", hscores["vanilla"], dash],
        ["1.2", dash, hscores["EntProp"]],
    ]


def test_points_are_drawn_where_their_numbers_are():
    x = Axis("x", [0, 10])
    y = Axis("y", [0.0, 1.0])
    drawn = chart("t", [Series("a", [(0, 0.0), (5, 0.5), (10, 1.0)], [None, 0.25, None])], x, y)
    svg = ElementTree.fromstring(re.search("<svg.*?</svg>", drawn)[0])
    circles = [(float(one.get("cx")), float(one.get("cy"))) for one in svg.iter("circle")]
    (left, bottom), middle, (right, top) = circles
    assert middle == pytest.approx(((left + right) / 2, (bottom + top) / 2))
    assert left < right
    assert top < bottom
    bar = next(one for one in svg.iter("line") if one.get("class") == "stroke")
    assert abs(float(bar.get("y1")) - float(bar.get("y2"))) == pytest.approx((bottom - top) / 2)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.43, 0.97), (-0.02, 0.057), (0, 3), (0, 1834.0), (0.5, 0.5), (0, 0), (-1.5, -1.2)]
)
def test_ticks_hold_their_range_and_are_few(low, high):
    ticks = ticks_between(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 8
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps))


def test_the_page_asks_for_nothing_and_is_for_everyone(tmp_path, seeds):
    text, page = write(tmp_path, seeds, images=pixels(2), costs={"EntProp": 2, "vanilla": 1})
    bare = re.sub("data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|javascript", bare)
    assert all(not (set(attributes) & {"href", "onclick", "onload"}) for _, attributes in page.tags)
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert sources
    assert all(one.startswith("data:image/png;base64,") for one in sources)
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    assert ("html", {"lang": "en"}) in page.tags
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert sum(tag == "caption" for tag, _ in page.tags) == sum(tag == "table" for tag, _ in page.tags)
    for need in ("prefers-color-scheme: dark", "@media print", "max-width: 640px"):
        assert need in text
    for drawn in re.findall("<svg.*?</svg>", text):
        ElementTree.fromstring(drawn)


def test_every_string_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>&\"<img src=x onerror=y>"
    attack, shift = f"a{evil}", f"s{evil}"
    one = result(0, attack, shift, auxiliaries={})
    whole = RobustnessResult(
        one.clean, one.corrupted, 0, one.shifts, one.adversarial, {f"d{evil}": result(1, attack, shift)}
    )
    names = {f"m{evil}": whole, f"n{evil}": result(2, attack, shift)}
    _, page = write(
        tmp_path,
        names,
        title=f"t{evil}",
        costs=dict.fromkeys(names, 1),
        cost_name=f"c{evil}",
        curves={name: {0: 1.0, 0.1: 0.0} for name in names},
        diagnostics={f"g{evil}": Gap((Layer(f"l{evil}", f"k{evil}", f"x{evil}", {f"p{evil}": 0.1}, None),))},
        command=f"run {evil}",
        facts={f"f{evil}": f"v{evil}"},
    )
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert "img" not in tags
    assert all("onerror" not in attributes for _, attributes in page.tags)
    shown = "".join(page.text)
    for letter in "tmnasdcgfvlp":
        assert f"{letter}{evil}" in shown, letter
    assert f"run {evil}" in shown


def test_one_result_needs_no_name_and_has_no_spread(tmp_path):
    one = result(0)
    text, page = write(tmp_path, one)
    _, row = page.tables["Scores in percent"]
    assert row[:4] == ["model", percent(one.sa), percent(one.ra), percent(one.hscore)]
    assert "±" not in text
    assert not any("minus" in caption for caption in page.tables)
    assert one.protocol in "".join(page.text)
    assert "do not compare" in text
    assert "a difference may be chance" in text


def test_auxiliary_domains_have_rows(tmp_path):
    own = result(1)
    main = result(0, auxiliaries={"aux": own})
    _, page = write(tmp_path, {"EntProp": main})
    row = page.tables["Scores in percent"][2]
    assert row[:4] == ["EntProp, auxiliary aux", percent(own.sa), percent(own.ra), percent(own.hscore)]


def test_versions_command_and_facts_are_told(tmp_path):
    text, _ = write(tmp_path, result(0), command="train --seeds 3", facts={"Commit": "abc123"})
    assert "<code>train --seeds 3</code>" in text
    assert "<dt>Commit</dt><dd>abc123</dd>" in text
    assert f"<dt>torch</dt><dd>{torch.__version__}</dd>" in text
    assert "UTC" in text


def test_what_an_evaluation_returns_is_taken(tmp_path):
    models = {"a": classifier(0), "b": classifier(1)}
    found = evaluate_robustness(
        models, loader(6), pixel_space=SPACE, corruptions=["fog"], severities=[2], progress=False
    )
    images, _ = next(iter(loader(6)))
    _, page = write(tmp_path, found, images=images, pixel_space=SPACE)
    assert page.tables["a: accuracy, %"][1] == ["fog", percent(found["a"].ra), percent(found["a"].ra)]


# Pictures -------------------------------------------------------------------------------------------------------------


def test_png_is_lossless():
    image = pixels(1, side=37)[0, :, :, :20]
    values = np.asarray(Image.open(io.BytesIO(png(image))))
    assert values.shape == (37, 20, 3)
    found = torch.tensor(values).permute(2, 0, 1)
    assert torch.equal(found, image.mul(255).round().byte())


def test_examples_are_corrupted_at_full_size_and_take_turns(tmp_path):
    images = pixels(2, side=40)
    text, _ = write(tmp_path, result(0), images=images)
    sources = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', text)
    assert len(sources) == 2 * 4
    for number, name in enumerate(CORRUPTIONS):
        one = images[number]
        changed = [corrupt(one[None], name, at, torch.Generator().manual_seed(0))[0] for at in SEVERITIES]
        expected = [one, *changed]
        for (source, alt), image in zip(sources[4 * number :], expected, strict=False):
            assert base64.b64decode(source) == png(image), alt
    assert sources[5][1] == "gaussian noise, severity 1"


def test_large_examples_are_shrunk_and_that_is_said(tmp_path):
    text, page = write(tmp_path, result(0), images=pixels(1, side=200))
    sizes = {(a["width"], a["height"]) for tag, a in page.tags if tag == "img"}
    assert sizes == {("128", "128")}
    assert "200 x 200 px, shown at 128 px" in text


# Diagnostics ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Layer:
    layer: str
    kind: str
    auxiliary: str
    parameters: dict
    statistics: float | None


@dataclass(frozen=True)
class Gap:
    layers: tuple


@dataclass(frozen=True)
class Stages:
    values: dict
    stages: dict
    classes: int


def test_entropies_are_a_histogram_of_shares(tmp_path):
    values = {"clean": (0.0, 0.01, 0.02, math.log(10)), "mixed": (1.0, 1.0)}
    stages = {"clean": Interval(0.583, 0.1, 1.0), "mixed": Interval(1.0)}
    text, page = write(tmp_path, result(0), diagnostics={"Entropies": Stages(values, stages, 10)})
    rows = page.tables["Entropies: mean entropy, nats"]
    assert rows[1:] == [["clean", "0.583 [0.1, 1]"], ["mixed", "1"]]
    svg = next(one for one in re.findall("<svg.*?</svg>", text) if "entropy, nats" in one)
    paths = [one for one in ElementTree.fromstring(svg).iter("path") if one.get("class").startswith("stroke")]
    heights = [{point.split(",")[1] for point in re.split("[ML]", one.get("d"))[1:]} for one in paths]
    assert [len(one) for one in heights] == [3, 2]  # 75 %, 25 % and none; 100 % and none


def test_domain_gap_and_other_types(tmp_path):
    layers = tuple(Layer(f"bn{i}", "BatchNorm2d", "aux", {"weight": 0.1 * i, "bias": 0.2}, 0.3) for i in range(3))
    _, page = write(tmp_path, result(0), diagnostics={"Gap": Gap(layers)})
    assert page.tables["Gap: parameters: relative distance, 0 to 2"][3] == ["bn2", "0.2", "0.2"]
    assert page.tables["Gap: statistics: divergence, nats"][1] == ["bn0", "0.3"]
    with pytest.raises(ConfigurationError, match=r"diagnostics\['x'\].*found int"):
        write(tmp_path, result(0), diagnostics={"x": 3})


@pytest.mark.filterwarnings("ignore:The stage")
def test_real_diagnostics_are_taken(tmp_path):
    model = entprop.wrap(classifier())
    with torch.no_grad():
        model[1].weight.mul_(1.5)
    options = {"pixel_space": SPACE, "progress": False}
    found = {
        "Entropies": diagnostics.entropy_stages(model, loader(12, 6), **options),
        "Gap": diagnostics.domain_gap(model),
        "Jacobian": diagnostics.input_jacobian(model, loader(4), **options),
        "Distance": diagnostics.feature_distance(model, loader(24, 12), covariance="shrunk", **options),
        "Outside": diagnostics.selection_ood(model, loader(24, 12), **options),
        "Features": diagnostics.feature_picture(model, loader(24, 12), **options),
    }
    _, page = write(tmp_path, result(0), diagnostics=found)
    rows = page.tables["Entropies: mean entropy, nats"][1:]
    assert [row[0] for row in rows] == list(found["Entropies"].stages)
    for row, interval in zip(rows, found["Entropies"].stages.values(), strict=True):
        assert row[1].startswith(f"{interval.value:.4g} [{interval.low:.4g}, ")
    (layer,) = found["Gap"].layers
    assert page.tables["Gap: parameters: relative distance, 0 to 2"][1] == [
        layer.layer,
        *(f"{value:.4g}" for value in layer.parameters.values()),
    ]
    ((_, frobenius, spectral),) = page.tables["Input Jacobian, mean over images"][1:]
    assert frobenius.startswith(f"{found['Jacobian'].frobenius_mean.value:.4g}")
    assert spectral.startswith(f"{found['Jacobian'].spectral_mean.value:.4g}")
    distances = page.tables["Distance: Fréchet distance of features to clean images"]
    assert [row[0] for row in distances[1:-1]] == list(found["Distance"].distances)
    assert len(page.tables["Outside: how well a score tells images of another distribution"]) == 4
    assert sum(one[0] == "circle" for one in page.tags) > 24


# Files and bad input --------------------------------------------------------------------------------------------------


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


def test_a_path_that_is_no_html_file_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"is a folder\. Write the file, .*report\.html"):
        report(result(0), tmp_path)
    with pytest.raises(ConfigurationError, match=r"Write '.*x\.html'; for a section in Markdown, model_card"):
        report(result(0), tmp_path / "x.md")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("results", "options", "error", "message"),
    [
        ({}, {}, ConfigurationError, "as many results"),
        ([1, 2], {}, ConfigurationError, "results must be.*found list"),
        ({"a": 3}, {}, ConfigurationError, r"results\['a'\].*found int"),
        ({"a": []}, {}, ConfigurationError, "as many results"),
        ({"a": result(0), "b": [result(1), result(2)]}, {}, ConfigurationError, "as many results"),
        ({"a": result(0), "b": result(1, severities=(1,))}, {}, ConfigurationError, "one protocol"),
        (result(0), {"costs": {"EntProp": 1}}, ConfigurationError, "costs.*'EntProp'.*'model'"),
        (result(0), {"costs": {"model": math.nan}}, ConfigurationError, "finite"),
        (result(0), {"costs": 3}, ConfigurationError, "costs must be a dict"),
        (result(0), {"curves": {"model": {0: 90.0}}}, ConfigurationError, r"\[0, 1\]"),
        (result(0), {"curves": {0: 0.9}}, ConfigurationError, "curves has an entry 0"),
        (result(0), {"confidence": 95}, ConfigurationError, "confidence"),
        (result(0), {"images": "cat.png"}, ImageError, "tensor"),
        (result(0), {"images": torch.zeros(3, 40, 40)}, ImageError, "shape"),
        (result(0), {"images": torch.rand(1, 3, 8, 8)}, ImageError, "32"),
        (result(0), {"images": torch.randn(1, 3, 40, 40)}, PixelRangeError, ""),
    ],
)
def test_bad_input_is_refused(tmp_path, results, options, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        report(results, tmp_path / "report.html", **options)
    assert list(tmp_path.iterdir()) == []
