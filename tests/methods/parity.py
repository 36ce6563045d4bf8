"""A step of a wrapped model beside a naive float64 reference: every figure, gradient and buffer, under one name.

The auxiliary copies are moved away from the main norms first. With equal copies, a net without batch statistics gives
the same numbers whichever norms a pass goes through, and hides every mistake in the switching.
"""

import copy
import itertools
from dataclasses import dataclass, field

import pytest
import torch

import entprop_wrap as entprop
from tests.reference import entprop as reference
from tests.reference import networks
from tests.reference.models import build, random_batch, shift_statistics

TOLERANCE = 1e-10
BATCH, FRACTION, SELECTED = 7, 0.4, 3
PIXELS = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SPACES = {"pixels": PIXELS, "imagenet": IMAGENET}


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def batch_in(space, size=BATCH, soft=False):
    """A batch normalised with ``space``."""
    images, labels = random_batch(size, soft=soft)
    mean, std = (images.new_tensor(space[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (images - mean) / std, labels


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


# The wrapped model's state under the plain model's names --------------------------------------------------------------


def plain_name(name, plain):
    """The entry of the plain model that ``name`` is an auxiliary copy of: but for the name in between, the same."""
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


class Rows(dict):
    """Quantities that should be equal, each by name with its norm and its relative error."""

    def add(self, name, found, wanted):
        wanted = torch.as_tensor(wanted, dtype=torch.float64).detach()
        self[name] = (wanted.norm().item(), relative_error(found, wanted))

    def add_model(self, model, gradients, buffers):
        """Gradients and buffers of a model, by the names in the two dictionaries of what they should be."""
        for name, gradient in gradients.items():
            self.add(f"gradient {name}", model.get_parameter(name).grad, gradient)
        for name, buffer in buffers.items():
            self.add(f"buffer {name}", model.get_buffer(name), buffer)

    def check(self, tolerance=TOLERANCE):
        wrong = {name: row for name, row in self.items() if not row[1] <= tolerance}
        table = "\n".join(f"  {name}: norm {norm:.3e}, off by {error:.2e}" for name, (norm, error) in wrong.items())
        assert not wrong, f"{len(wrong)} of {len(self)} quantities differ from the reference:\n{table}"


def compare_state(rows, pair, expected):
    """Add the gradients and buffers of both domains."""
    groups = {
        "gradient": (pair.gradients(), (expected.main_gradients, expected.auxiliary_gradients)),
        "buffer": (pair.buffers(), (expected.main_buffers, expected.auxiliary_buffers)),
    }
    for what, (found, wanted) in groups.items():
        for domain, ours, theirs in zip(("main", "aux"), found, wanted, strict=True):
            assert set(ours) == set(theirs), f"{domain} {what}s: {set(ours) ^ set(theirs)}"
            for name in theirs:
                rows.add(f"{domain} {what} {name}", ours[name], theirs[name])


def assert_matches(pair, out, expected, hardened=None):
    """Compare every figure of a step; ``hardened`` are attacked images that the output does not show."""
    rows = Rows()
    for name in ("loss", "main_loss", "logits", "passes", "aux_loss", "aux_logits", "aux_images"):
        found, wanted = getattr(out, name), getattr(expected, name)
        if name == "aux_images" and hardened is not None:
            found = hardened
        if wanted is None:
            assert found is None, name
        else:
            assert not getattr(found, "requires_grad", False), name
            rows.add(name, found, wanted)
    assert not out.entropy.requires_grad
    rows.add("entropy", out.entropy, [networks.entropy(row) for row in expected.logits])
    selected = None if out.selected is None else out.selected.tolist()
    wanted = getattr(expected, "selected", None)
    assert selected == (None if wanted is None else list(wanted))
    compare_state(rows, pair, expected)
    rows.check()


def run(pair, batch, method, space=PIXELS):
    """One step with seeded draws."""
    return entprop.training_step(
        pair.model, *batch, method=method, pixel_space=entprop.PixelSpace(**space), generator=seeded()
    )
