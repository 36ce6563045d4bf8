"""Accuracy as a function of the size of an attack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional import attacks
from entprop_wrap.robustness.attacks import PGD, Transfer, attacked, check_attack
from entprop_wrap.robustness.corruptions.random import Streams
from entprop_wrap.robustness.distributed import ShardedData
from entprop_wrap.robustness.evaluated_model import EvaluatedModel, check_state
from entprop_wrap.robustness.pixels import space_of
from entprop_wrap.utils.options import check_flag, check_number, check_seed, check_sequence, shown

__all__ = ["accuracy_against_epsilon"]


def accuracy_against_epsilon(
    model: nn.Module,
    data: Iterable[Any],
    epsilons: Sequence[float] = (0, 0.5 / 255, 1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 32 / 255),
    *,
    attack: attacks.PGD | Transfer | None = None,
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
        attack: What to do at each epsilon, its own being replaced; None: :class:`PGD` as it comes.
        pixel_space: What the data is normalised with; None: nothing.
        seed: Seed of random starts.
        progress: Show a progress bar, on the first process.

    Raises:
        ConfigurationError: No epsilons, or one twice; a model in training mode.
        PixelRangeError: An epsilon that is not a fraction of the pixel range.
        DataError, ImageError, LabelError, ModelOutputError: As :func:`~entprop_wrap.robustness.evaluate_robustness`.
    """
    check_state(model, "The model")
    sizes = [
        check_number("An entry of epsilons", size, lambda value: value >= 0, "of at least 0")
        for size in check_sequence("epsilons", epsilons, "different numbers", "epsilons=(0, 4 / 255)")
    ]
    if len(set(sizes)) < len(sizes):
        raise ConfigurationError(f"epsilons must be different numbers, found {shown(epsilons)}.")
    check_seed(seed)
    check_flag("progress", progress)
    base = PGD() if attack is None else attack
    if isinstance(base, type) or not hasattr(base, "at"):
        raise ConfigurationError(f"attack must be FGSM(), PGD() or Transfer(source), found {shown(base)}.")
    base = check_attack("attack", base)
    sized = {epsilon: base.at(epsilon) if epsilon else None for epsilon in sizes}
    subject, space, streams = EvaluatedModel("The model", model), space_of(pixel_space), Streams(seed)
    share = ShardedData(data, space)
    with tqdm(total=len(share) * len(sized) or None, disable=not progress or share.process > 0, unit="pass") as bar:
        for batch in share:
            for epsilon, one in sized.items():
                images = batch.images
                if one is not None:
                    generator = streams.at(batch.position, "epsilon")
                    images = attacked("attack", one, subject.model, images, batch.labels, space, generator)
                subject.measure(("epsilon", str(epsilon)), images, batch.labels, batch.counted)
                bar.update()
            subject.check_logits()
    return {epsilon: subject.scores(("epsilon", str(epsilon))).accuracy for epsilon in sized}
