"""``training_step`` against the naive float64 reference: every figure, gradient and buffer of one step.

The auxiliary copies are moved away from the main norms first. With equal copies, a net without batch statistics gives
the same numbers whichever norms a pass goes through, and hides every mistake in the switching.
"""

import copy
import itertools
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import entprop_wrap as entprop
from entprop_wrap import functional
from entprop_wrap.functional import uncertainty
from entprop_wrap.methods import Vanilla
from tests.reference import entprop as reference
from tests.reference.models import CLASSES, MODELS, build, random_batch, shift_statistics

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")

TOLERANCE = 1e-10
BATCH, FRACTION, SELECTED = 7, 0.4, 3
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


# Mixers that do what they are told -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedMix:
    """What a mixer's ``draw`` returns; the reference's own blend does the mixing."""

    blend: reference.Blend

    @property
    def share(self):
        return self.blend.share

    @property
    def partner(self):
        return torch.tensor(self.blend.partner)

    def apply(self, tensor):
        return self.blend(tensor)


@dataclass(frozen=True)
class FixedMixer:
    """Always the same mix; remembers the shapes it was asked for."""

    blend: reference.Blend
    shapes: list = field(default_factory=list, compare=False)

    def draw(self, shape, generator=None):
        self.shapes.append(tuple(shape))
        return FixedMix(self.blend)


BOX = (1, 6, 3, 8)  # 5 x 5 of 8 x 8 pixels
BOX_SHARE = 1 - 25 / 64
BLENDS = {
    # the share is below one half: the sample's own label is then the smaller part of its mixed target
    ("mixup", "batch"): reference.Blend(0.3, (3, 0, 6, 1, 4, 2, 5)),
    ("mixup", "auxiliary"): reference.Blend(0.3, (2, 0, 1)),
    ("cutmix", "batch"): reference.Blend(BOX_SHARE, (3, 0, 6, 1, 4, 2, 5), BOX),
    ("cutmix", "auxiliary"): reference.Blend(BOX_SHARE, (2, 0, 1), BOX),
}


# The wrapped model's state under the plain model's names --------------------------------------------------------------


def plain_name(name, plain):
    """The entry of the plain model that ``name`` is an auxiliary copy of: the same but for the holder in between."""
    *path, leaf = name.split(".")
    for length in range(len(path) - 1, -1, -1):
        candidate = ".".join([*path[:length], leaf])
        if candidate in plain:
            return candidate
    raise AssertionError(f"{name} copies nothing of the plain model")


def split(entries, plain):
    """Entries of a wrapped model as (main, auxiliary), both under plain names."""
    entries = dict(entries)
    main = {name: value for name, value in entries.items() if name in plain}
    auxiliary = {plain_name(name, plain): value for name, value in entries.items() if name not in plain}
    assert len(main) + len(auxiliary) == len(entries), "two copies of one entry"
    return main, auxiliary


def snapshot(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


class Pair:
    """A plain model, its wrapped twin with perturbed copies, and the state both start from."""

    def __init__(self, kind, seed=0):
        self.plain = build(kind, seed=seed)
        self.names = set(self.plain.state_dict())
        self.model = entprop.wrap(copy.deepcopy(self.plain))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 77)
            for name, parameter in self.model.named_parameters():
                if name not in self.names:
                    parameter.add_(0.3 * torch.randn_like(parameter))
            for name, buffer in self.model.named_buffers():
                if name not in self.names:
                    shift_statistics(name, buffer)
        self.main, self.auxiliary = map(snapshot, self.state())

    def state(self):
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return split(tensors, self.names)

    def buffers(self):
        return split(self.model.named_buffers(), self.names)

    def gradients(self):
        """(main and shared, auxiliary) gradients, zeros where there are none."""
        found = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self.model.named_parameters()
        }
        return split(found, self.names)

    def reference(self, images, labels, **options):
        return reference.step(self.plain, self.main, self.auxiliary, images, labels, **options)


# The comparison -------------------------------------------------------------------------------------------------------


def relative_error(found, expected):
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    if found.shape != expected.shape or not found.isfinite().all():
        return float("inf")
    # a bias in front of a BatchNorm has no gradient but for rounding: below the floor errors count as absolute
    return ((found - expected).norm() / expected.norm().clamp_min(1e-3)).item()


def differences(pair, out, expected):
    """Every quantity of a step, with its reference value and relative error."""
    rows = {}

    def add(name, found, wanted):
        wanted = torch.as_tensor(wanted, dtype=torch.float64)
        rows[name] = (wanted.norm().item(), relative_error(found, wanted))

    for name in ("loss", "main_loss", "aux_loss", "logits", "entropy", "aux_logits", "aux_images", "passes"):
        add(name, getattr(out, name), getattr(expected, name))
    groups = {
        "gradient": (pair.gradients(), (expected.main_gradients, expected.auxiliary_gradients)),
        "buffer": (pair.buffers(), (expected.main_buffers, expected.auxiliary_buffers)),
    }
    for what, (found, wanted) in groups.items():
        for domain, ours, theirs in zip(("main", "aux"), found, wanted, strict=True):
            assert set(ours) == set(theirs), f"{domain} {what}s: {set(ours) ^ set(theirs)}"
            for name in theirs:
                add(f"{domain} {what} {name}", ours[name], theirs[name])
    return rows


def assert_equal(rows, tolerance=TOLERANCE):
    wrong = {name: row for name, row in rows.items() if not row[1] <= tolerance}
    table = "\n".join(f"  {name}: norm {norm:.3e}, off by {error:.2e}" for name, (norm, error) in wrong.items())
    assert not wrong, f"{len(wrong)} of {len(rows)} quantities differ from the reference:\n{table}"


def assert_step_matches(pair, out, expected):
    assert out.selected.tolist() == list(expected.selected)
    for name in ("loss", "main_loss", "aux_loss", "logits", "entropy", "aux_logits", "aux_images"):
        assert not getattr(out, name).requires_grad, name
    assert_equal(differences(pair, out, expected))


# The table ------------------------------------------------------------------------------------------------------------

MIXINGS = (None, *BLENDS)
BINARY = {
    "weighting": ("per_image", "sum"),
    "soft": (False, True),
    "target": ("mixed", "source"),
    "space": (None, IMAGENET),
}


@dataclass(frozen=True)
class Case:
    kind: str
    steps: int
    mixing: tuple | None
    weighting: str
    soft: bool
    target: str
    space: dict | None

    def __str__(self):
        mixing = "-".join(self.mixing or ("unmixed",))
        labels = "soft" if self.soft else "int"
        space = "imagenet" if self.space else "pixels"
        return f"{self.kind}-{self.steps}-{mixing}-{self.weighting}-{labels}-{self.target}-{space}"


def table():
    """Each model x steps x mixing once; the two-valued options walk through their 16 combinations."""
    rows = itertools.product(MODELS, (0, 1, 2, 5), MIXINGS)
    for index, row in enumerate(rows):
        code = 7 * index + index // 16
        yield Case(*row, *(values[code >> bit & 1] for bit, values in enumerate(BINARY.values())))


def test_the_table_has_every_pair_of_values():
    rows = [[str(value) for value in vars(case).values()] for case in table()]
    for first, second in itertools.combinations(range(len(rows[0])), 2):
        seen = {(row[first], row[second]) for row in rows}
        assert len(seen) == len({row[first] for row in rows}) * len({row[second] for row in rows})


@pytest.mark.parametrize("case", list(table()), ids=str)
def test_a_step_equals_the_reference(case):
    pair = Pair(case.kind)
    images, labels = random_batch(BATCH, soft=case.soft)
    space = case.space or {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    if case.space:
        mean, std = (images.new_tensor(space[name]).view(3, 1, 1) for name in ("mean", "std"))
        images = (images - mean) / std
    blend = BLENDS.get(case.mixing)
    mixer = blend and FixedMixer(blend)
    given = images.clone(), labels.clone()

    out = entprop.training_step(
        pair.model,
        images,
        labels,
        method=entprop.EntProp(
            fraction=FRACTION,
            attack_steps=case.steps,
            mix=mixer,
            mix_on=case.mixing[1] if case.mixing else "batch",
            auxiliary_target=case.target,
            weighting=case.weighting,
        ),
        pixel_space=entprop.PixelSpace(**case.space) if case.space else None,
    )

    assert torch.equal(images, given[0])
    assert torch.equal(labels, given[1])
    assert images.grad is None
    assert not images.requires_grad
    if mixer:
        assert mixer.shapes == [(BATCH if case.mixing[1] == "batch" else SELECTED, *images.shape[1:])]
    expected = pair.reference(
        images,
        labels,
        fraction=FRACTION,
        attack_steps=case.steps,
        batch_blend=blend if case.mixing and case.mixing[1] == "batch" else None,
        auxiliary_blend=blend if case.mixing and case.mixing[1] == "auxiliary" else None,
        auxiliary_target=case.target,
        weighting=case.weighting,
        order=out.selected.tolist(),
        **space,
    )
    assert_step_matches(pair, out, expected)


# Single options -------------------------------------------------------------------------------------------------------


def run(pair, images, labels, **options):
    """One unmixed step and its reference with the same options."""
    space = options.pop("space", None)
    out = entprop.training_step(
        pair.model,
        images,
        labels,
        method=entprop.EntProp(mix=None, **options),
        pixel_space=entprop.PixelSpace(**space) if space else None,
    )
    return out, pair.reference(images, labels, order=out.selected.tolist(), **options, **(space or {}))


@pytest.mark.parametrize(
    ("steps", "epsilon", "step_size"),
    [
        (1, None, 8 / 255),  # the default epsilon, 1/255, holds a large step back
        (2, None, 8 / 255),  # here it is 3/255
        (1, 8 / 255, None),  # one step goes all the way
        (1, 8 / 255, 1 / 255),
        (3, 1.5 / 255, 1 / 255),  # the second step runs into epsilon
        (5, 4 / 255, None),  # steps of a sixth of epsilon
        (5, 4 / 255, 1 / 255),
        (3, 32 / 255, 16 / 255),  # many pixels run into black or white
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_epsilon_and_step_size(kind, steps, epsilon, step_size):
    pair = Pair(kind)
    images, labels = random_batch(BATCH)
    options = {"fraction": FRACTION, "attack_steps": steps, "epsilon": epsilon, "step_size": step_size}
    out, expected = run(pair, images, labels, **options)
    assert_step_matches(pair, out, expected)
    moved = (out.aux_images - images[out.selected]).abs().max().item()
    assert 0 < moved <= (epsilon or {1: 1, 2: 3}[steps] / 255) + 1e-12
    assert out.aux_images.min() >= 0
    assert out.aux_images.max() <= 1


@pytest.mark.parametrize(
    ("size", "fraction", "selected"),
    [(7, 0.2, 2), (7, 0.01, 2), (2, 0.2, 2), (5, 0.5, 3), (5, 0.3, 2), (7, 0.6, 4), (7, 1.0, 7)],
)
def test_how_many_samples_are_selected(size, fraction, selected):
    pair = Pair("batch_norm")
    out, expected = run(pair, *random_batch(size), fraction=fraction)
    assert len(out.selected) == selected
    assert_step_matches(pair, out, expected)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("entropy", reference.entropy),
        ("least_confidence", reference.confidence),
        ("logit_margin", reference.margin),
        ("cross_entropy", lambda logits, label: reference.cross_entropy(logits, label).item()),
    ],
)
def test_uncertainty_scores(ours, theirs, soft):
    pair = Pair("batch_norm")
    images, labels = random_batch(BATCH, soft=soft)
    score = getattr(uncertainty, ours)
    out = entprop.training_step(
        pair.model, images, labels, method=entprop.EntProp(fraction=FRACTION, mix=None, uncertainty=score)
    )
    expected = pair.reference(images, labels, fraction=FRACTION, uncertainty=theirs)  # most uncertain first
    assert_step_matches(pair, out, expected)
    scores = [theirs(row, label) for row, label in zip(out.logits, labels, strict=True)]
    assert relative_error(score(out.logits, labels), scores) < TOLERANCE


@pytest.mark.parametrize("mix_on", ["batch", "auxiliary"])
@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
@pytest.mark.parametrize("kind", ["batch_norm", "layer_norm"])
def test_drawn_mixes(kind, name, mix_on):
    """The same seed gives ``draw`` outside the step what the step itself draws."""
    pair = Pair(kind)
    images, labels = random_batch(BATCH)
    mixer = getattr(functional, name)(alpha=1.0)
    shape = images.shape if mix_on == "batch" else torch.Size((SELECTED, *images.shape[1:]))
    seed, drawn = telling_draw(mixer, shape)
    blend = as_blend(drawn, shape)

    out = entprop.training_step(
        pair.model,
        images,
        labels,
        method=entprop.EntProp(fraction=FRACTION, mix=mixer, mix_on=mix_on),
        generator=torch.Generator().manual_seed(seed),
    )

    where = {"batch": "batch_blend", "auxiliary": "auxiliary_blend"}[mix_on]
    expected = pair.reference(images, labels, fraction=FRACTION, order=out.selected.tolist(), **{where: blend})
    assert_step_matches(pair, out, expected)


def telling_draw(mixer, shape):
    """The first seed, and what it draws, with which every sample gets another partner and a fair part of it."""
    for seed in itertools.count():
        mix = mixer.draw(shape, torch.Generator().manual_seed(seed))
        if 0.2 < mix.share < 0.8 and all(i != j for i, j in enumerate(mix.partner.tolist())):
            return seed, mix


def as_blend(mix, shape):
    """A drawn mix in the reference's terms; a CutMix shows its box when it is applied to numbered images."""
    partner = mix.partner.tolist()
    assert sorted(partner) == list(range(shape[0]))
    assert 0 <= mix.share <= 1
    numbered = torch.arange(shape[0], dtype=torch.float64).view(-1, 1, 1, 1).expand(shape)
    applied = mix.apply(numbered)[0, 0]
    if len(applied.unique()) == 1:  # MixUp: all pixels alike
        return reference.Blend(float(mix.share), partner)
    rows, columns = (applied == partner[0]).nonzero(as_tuple=True)
    box = (rows.min().item(), rows.max().item() + 1, columns.min().item(), columns.max().item() + 1)
    area = (box[1] - box[0]) * (box[3] - box[2])
    assert len(rows) == area, "not a box"
    assert mix.share == pytest.approx(1 - area / applied.numel(), abs=1e-12)
    return reference.Blend(1 - area / applied.numel(), partner, box)


def test_a_loss_of_ones_own_serves_both_branches():
    pair = Pair("batch_norm")
    images, labels = random_batch(BATCH)
    out = entprop.training_step(
        pair.model,
        images,
        labels,
        method=entprop.EntProp(fraction=FRACTION, attack_steps=2, mix=None),
        loss=nn.CrossEntropyLoss(label_smoothing=0.2),
    )
    smoothed = 0.8 * F.one_hot(labels, CLASSES).double() + 0.2 / CLASSES
    options = {"fraction": FRACTION, "attack_steps": 2, "order": out.selected.tolist()}
    assert_step_matches(pair, out, pair.reference(images, smoothed, **options))


def test_defaults():
    """EntProp(): one step of 1/255 on the fifth of the batch that is most uncertain after MixUp of all of it."""
    pair = Pair("batch_norm")
    images, labels = random_batch(13)
    seed, drawn = telling_draw(entprop.MixUp(alpha=1.0), images.shape)
    blend = as_blend(drawn, images.shape)
    out = entprop.training_step(pair.model, images, labels, generator=torch.Generator().manual_seed(seed))
    assert len(out.selected) == 3
    assert_step_matches(pair, out, pair.reference(images, labels, batch_blend=blend, order=out.selected.tolist()))


def test_torchs_own_generator_is_the_default():
    images, labels = random_batch(BATCH)
    outs = []
    for seeded in (torch.Generator().manual_seed(3), None):
        torch.manual_seed(3)
        outs.append(entprop.training_step(Pair("batch_norm").model, images, labels, generator=seeded))
    assert torch.equal(outs[0].aux_images, outs[1].aux_images)
    assert torch.equal(outs[0].loss, outs[1].loss)


@pytest.mark.parametrize("kind", MODELS)
def test_two_steps_add_their_gradients_and_move_statistics_twice(kind):
    pair = Pair(kind)
    total = None
    for seed in (0, 1):
        images, labels = random_batch(BATCH, seed=seed)
        pair.main, pair.auxiliary = map(snapshot, pair.state())
        out, expected = run(pair, images, labels, fraction=FRACTION, attack_steps=2)
        if total is None:
            total = expected
            continue
        for ours, theirs in (
            (expected.main_gradients, total.main_gradients),
            (expected.auxiliary_gradients, total.auxiliary_gradients),
        ):
            for name in ours:
                ours[name] = ours[name] + theirs[name]
        assert_step_matches(pair, out, expected)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", ["batch_norm", "mixed_norms"])
def test_statistics_move_once_whatever_the_number_of_steps(kind, steps):
    pair = Pair(kind)
    run(pair, *random_batch(BATCH), fraction=FRACTION, attack_steps=steps)
    for buffers, before in zip(pair.buffers(), (pair.main, pair.auxiliary), strict=True):
        counters = [name for name in buffers if name.endswith("num_batches_tracked")]
        assert len(counters) == {"batch_norm": 2, "mixed_norms": 3}[kind]
        for name, buffer in buffers.items():
            if name in counters:
                assert buffer == before[name] + 1
            else:
                assert not torch.equal(buffer, before[name])


def test_frozen_parameters_stay_without_gradients():
    """A frozen stem still has to pass the gradient of the pixels on."""
    pair = Pair("batch_norm")
    for name, parameter in pair.model.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "bn1.bias")))
    out, expected = run(pair, *random_batch(BATCH), fraction=FRACTION, attack_steps=2)
    assert pair.model.conv1.weight.grad is None
    assert pair.model.bn1.bias.grad is None
    expected.main_gradients["conv1.weight"].zero_()
    expected.main_gradients["bn1.bias"].zero_()
    assert_step_matches(pair, out, expected)


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_images_in_another_memory_layout(layout):
    pair = Pair("batch_norm")
    images, labels = random_batch(BATCH)
    if layout == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    else:
        images = torch.cat([images, images], dim=3)[..., : images.shape[3]]
    out, expected = run(pair, images, labels, fraction=FRACTION, attack_steps=2)
    assert_step_matches(pair, out, expected)


class Output(dict):
    """A mapping with attributes, as the Hub's models return."""

    def __getattr__(self, name):
        return self[name]


@pytest.mark.parametrize("wrapper", [lambda logits: {"logits": logits}, lambda logits: Output(logits=logits)])
def test_models_that_return_more_than_a_tensor(wrapper):
    pair = Pair("batch_norm")
    pair.model.register_forward_hook(lambda module, args, output: wrapper(output))
    out, expected = run(pair, *random_batch(BATCH), fraction=FRACTION, attack_steps=2)
    assert_step_matches(pair, out, expected)


def test_vanilla_trains_the_main_network_alone():
    pair = Pair("batch_norm")
    images, labels = random_batch(BATCH)
    out = entprop.training_step(pair.model, images, labels, method=Vanilla())
    loss = F.cross_entropy(pair.plain(images), labels)
    loss.backward()
    main, auxiliary = pair.buffers()
    rows = {
        "loss": (loss.item(), relative_error(out.loss, loss.detach())),
        "main_loss": (loss.item(), relative_error(out.main_loss, loss.detach())),
    }
    for name, parameter in pair.plain.named_parameters():
        found = pair.model.get_parameter(name).grad
        rows[name] = (parameter.grad.norm().item(), relative_error(found, parameter.grad))
    for name, buffer in pair.plain.named_buffers():
        rows[name] = (buffer.double().norm().item(), relative_error(main[name], buffer))
    assert_equal(rows)
    assert out.aux_loss is None
    assert out.passes == 1
    assert all(torch.equal(buffer, pair.auxiliary[name]) for name, buffer in auxiliary.items())
    copies = [p for name, p in pair.model.named_parameters() if name not in pair.names]
    assert copies
    assert all(p.grad is None for p in copies)


def test_no_switch_leaks_out_of_a_step():
    """Afterwards the model is its main network: unwrapped, it is the plain model after the same main pass."""
    pair = Pair("mixed_norms")
    images, labels = random_batch(BATCH)
    out, expected = run(pair, images, labels, fraction=FRACTION, attack_steps=2)
    assert_step_matches(pair, out, expected)
    pair.plain.load_state_dict({**pair.main, **expected.main_buffers})
    assert pair.model.training
    with torch.no_grad():
        assert torch.equal(pair.model.eval()(images), pair.plain.eval()(images))
        assert torch.equal(entprop.unwrap(pair.model)(images), pair.plain(images))
