"""SA, RA and Hscore of one or several models in one pass over the data, and accuracy by the size of an attack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

from torch import nn
from tqdm.auto import tqdm

from entprop_wrap.data.pixel_space import PixelSpace, space_of
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional import attacks as training_attacks
from entprop_wrap.robustness.attacks import PGD, AttackFunction, attacked, check_attack
from entprop_wrap.robustness.autoattack import AutoAttack
from entprop_wrap.robustness.corruptions import Corruption, conditions_of
from entprop_wrap.robustness.corruptions.random import Streams
from entprop_wrap.robustness.distributed import ShardedData
from entprop_wrap.robustness.evaluated_model import EvaluatedModel, check_state, device_of, evaluated_models, in_domain
from entprop_wrap.robustness.result import RobustnessResult
from entprop_wrap.utils.options import check_flag, check_mapping, check_number, check_seed, check_sequence, shown

_ALONE = "The model"
_CLEAN = ("clean images",)


@overload
def evaluate_robustness(model: nn.Module, data: Iterable[Any], **options: Any) -> RobustnessResult: ...


@overload
def evaluate_robustness(
    model: Mapping[str, nn.Module], data: Iterable[Any], **options: Any
) -> dict[str, RobustnessResult]: ...


def evaluate_robustness(  # type: ignore[misc]  # the overloads leave the options to this one
    model: nn.Module | Mapping[str, nn.Module],
    data: Iterable[Any],
    *,
    pixel_space: PixelSpace | None = None,
    corruptions: Sequence[str | Corruption] | None = None,
    suite: str | None = None,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    seed: int = 0,
    auxiliaries: bool = False,
    shifts: Mapping[str, Iterable[Any]] | None = None,
    attacks: Mapping[str, AttackFunction] | None = None,
    progress: bool = True,
) -> RobustnessResult | dict[str, RobustnessResult]:
    """Measure accuracy on clean images (SA) and on corrupted ones (RA), and their harmonic mean (Hscore).

        result = evaluate_robustness(model.eval(), loader, pixel_space=PixelSpace(mean, std))
        print(result.to_markdown())

    The corruptions are drawn from the seed and an image's place in the data alone: two runs, two models and two batch
    sizes see the same images. Several processes share the batches of data that each of them has whole, and return the
    same result. For mixed precision, call this inside ``torch.autocast``.

    Args:
        model: A classifier, wrapped or not, in evaluation mode, on any device; or several of them by name.
        data: Batches ``(images, labels)``, or dicts with "pixel_values", "images" or "image" and "labels" or "label".
            Images are ``(N, 3, H, W)``, floating point, in ``pixel_space``, at least 32 px; labels are class indices.
        pixel_space: What the data is normalised with; None: nothing, images are in [0, 1].
        corruptions: Names from any of the ``SUITES``, or your own (:func:`corruption`); None: all of ``suite``.
        suite: "c", the 15 of ImageNet-C (None: these), or "c-bar", the 10 of ImageNet-C-bar.
        severities: From 1 (mild) to 5 (strong).
        seed: Seed of corruptions and attacks.
        auxiliaries: Also evaluate each auxiliary domain of wrapped models, as ``result.auxiliaries``.
        shifts: Other data of the same classes and pixel space by name ("sketch", say), evaluated without corruption.
        attacks: Attacks by name, on the clean images of ``data``: ``{"PGD-20 4/255": PGD(4 / 255, steps=20)}``.
        progress: Show a progress bar, on the first process.

    Returns:
        The result, or a dict of results by the names of the models. Accuracies are in [0, 1].

    Raises:
        ConfigurationError: A model is in training mode; an option is out of range; an attack does not fit the model.
        UnsupportedModelError: A model is inside an ``auxiliary()`` block, or not a module.
        NotWrappedError: ``auxiliaries=True``, and no model is wrapped.
        DataError: The data is empty, of an unknown form, or not the same on every process.
        ImageError: Images of a wrong type or shape, too small, or not finite.
        PixelRangeError: Images that do not lie in ``pixel_space``.
        LabelError: Labels of a wrong type or shape, or that do not fit the model.
        ModelOutputError: No logits, or logits that are NaN or infinite.

    Source: EntProp (Enomoto, UAI 2024), section 4.1; protocol of Hendrycks & Dietterich (ICLR 2019).
    """
    several = isinstance(model, Mapping)
    models = check_mapping("model", model if several else {_ALONE: model}, "models", '{"net": model}')
    conditions = conditions_of(corruptions, severities, suite)
    seed = check_seed(seed)
    for name, value in (("auxiliaries", auxiliaries), ("progress", progress)):
        check_flag(name, value)
    shifts = check_mapping("shifts", shifts, "data", 'shifts={"sketch": sketch_loader}')
    space = space_of(pixel_space)
    given = check_mapping("attacks", attacks, "attacks", 'attacks={"PGD-20": PGD(steps=20)}')
    attacks = {name: check_attack(f"attacks[{name!r}]", attack) for name, attack in given.items()}
    groups = evaluated_models(models, auxiliaries)
    subjects = [subject for group in groups.values() for subject in group]

    share, streams = ShardedData(data, space), Streams(seed)
    # Now, so that what is not data fails before the many passes, not after.
    others = {name: ShardedData(other, space, f"shifts[{name!r}]") for name, other in shifts.items()}
    passes = len(share) * len(subjects) * (1 + len(conditions) + len(attacks))
    hidden = not progress or share.process > 0
    with tqdm(total=passes or None, desc="Robustness", unit="pass", disable=hidden) as bar:
        for batch in share:
            for subject in subjects:
                subject.measure(_CLEAN, batch)
            bar.update(len(subjects))
            for name, attack in attacks.items():
                for subject in subjects:
                    generator = streams.at(batch.position, "attack", name)
                    with in_domain(subject.model, subject.domain):
                        images = attacked(f"attacks[{name!r}]", attack, subject.model, batch, space, generator)
                    subject.measure(("attack", name), batch._replace(images=images))
                bar.update(len(subjects))
            # After the attacks: one that does not fit the model is to fail before the many passes, not after.
            # Accelerators corrupt much faster than a CPU; what is drawn is the same on all of them.
            pixels = space.to_pixels(batch.images.to(device_of(subjects[0].model, batch.images)))
            for (name, severity), corrupt in conditions.items():
                corrupted = corrupt(pixels, severity, streams.at(batch.position, name, severity))
                changed = batch._replace(images=space.to_images(corrupted).to(batch.images.dtype))
                for subject in subjects:
                    subject.measure((name, severity), changed)
                bar.update(len(subjects))
            for subject in subjects:
                subject.check_logits()
    for name, other in others.items():
        for batch in other:
            for subject in subjects:
                subject.measure(("shift", name), batch)
                subject.check_logits()

    def result(subject: EvaluatedModel) -> RobustnessResult:
        return RobustnessResult(
            clean=subject.scores(_CLEAN),
            corrupted={condition: subject.scores(condition) for condition in conditions},
            seed=seed,
            shifts={name: subject.scores(("shift", name), f"shifts[{name!r}]") for name in shifts},
            adversarial={name: subject.scores(("attack", name)) for name in attacks},
        )

    results = {
        name: replace(result(main), auxiliaries={subject.domain or "": result(subject) for subject in domains})
        for name, (main, *domains) in groups.items()
    }
    return results if several else results[_ALONE]


def accuracy_against_epsilon(
    model: nn.Module,
    data: Iterable[Any],
    epsilons: Sequence[float] = (0, 0.5 / 255, 1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 32 / 255),
    *,
    attack: training_attacks.PGD | AutoAttack | None = None,
    pixel_space: PixelSpace | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[float, float]:
    """Return accuracy in [0, 1] by epsilon.

    A curve that does not reach 0 at large epsilons tells of an attack that fails, not of a robust model (Carlini et al.
    2019, "On evaluating adversarial robustness", section 5). Random starts of an image are the same at every epsilon,
    up to size.

    Args:
        model: In evaluation mode, in its main domain.
        data: Batches in ``pixel_space``, as :func:`~entprop_wrap.robustness.evaluate_robustness` takes them.
        epsilons: Fractions of the pixel range (for ``norm="l2"``, lengths in that unit); 0 means no attack.
        attack: PGD, FGSM or AutoAttack, whose own epsilon is replaced; None: :class:`PGD` as it comes.
        pixel_space: What the data is normalised with; None: nothing.
        seed: Seed of random starts.
        progress: Show a progress bar, on the first process.

    Raises:
        ConfigurationError: No epsilons; a model in training mode; an attack without a magnitude.
        PixelRangeError: An epsilon that is not a fraction of the pixel range.
        DataError, ImageError, LabelError, ModelOutputError: As :func:`~entprop_wrap.robustness.evaluate_robustness`.
    """
    check_state(model, "The model")
    sizes = [
        check_number("An entry of epsilons", size, lambda value: value >= 0, "of at least 0")
        for size in check_sequence("epsilons", epsilons, "numbers", "epsilons=(0, 4 / 255)")
    ]
    check_seed(seed)
    check_flag("progress", progress)
    base = check_attack("attack", PGD() if attack is None else attack)
    if not hasattr(base, "at"):
        raise ConfigurationError(f"attack must be PGD(), FGSM() or AutoAttack(), found {shown(base)}.")
    sized = {epsilon: base.at(epsilon) if epsilon else None for epsilon in sizes}
    subject, space, streams = EvaluatedModel("The model", model), space_of(pixel_space), Streams(seed)
    share = ShardedData(data, space)
    with tqdm(total=len(share) * len(sized) or None, disable=not progress or share.process > 0, unit="pass") as bar:
        for batch in share:
            for epsilon, one in sized.items():
                changed = batch
                if one is not None:
                    generator = streams.at(batch.position, "epsilon")
                    changed = batch._replace(images=attacked("attack", one, subject.model, batch, space, generator))
                subject.measure(("epsilon", str(epsilon)), changed)
                bar.update()
            subject.check_logits()
    return {epsilon: subject.scores(("epsilon", str(epsilon))).accuracy for epsilon in sized}
