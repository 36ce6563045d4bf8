"""``Monitor``: watches a training run for the ways in which EntProp and its relatives fail quietly."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.utils.options import check_integer, shown

#: Selected images should have at least this much more entropy than all images, relatively.
_LEAST_LEAD = 0.05
#: The AUROC of the energy should be this many standard errors above one half.
_ERRORS = 2
#: Values that are kept of a step: two losses, two entropies, an AUROC and its square.
_VALUES = 6
#: Above this share of ``log C`` a model has not begun to learn, and its entropies say nothing.
_UNLEARNT = 0.9
#: Growth of the auxiliary loss that is too much: beyond this factor, and this share of ``log C``.
_GROWTH, _GROWTH_SHARE = 1.5, 0.1
#: The auxiliary loss of a model that learns is below this many times ``log C``, the loss of a guess.
_WORSE_THAN_CHANCE = 1.5
#: Looks, or evaluations, in a row before a warning.
_PATIENCE = 3
#: A validation loss that is too high: above its best by this factor, and this share of ``log C``.
_PART, _PART_SHARE = 1.1, 0.02


class Monitor:
    """Warns of three ways to fail, once each, with the numbers and what to try.

    * "selection": selected images are no more uncertain, or no further out of the distribution, than all images, or
      uncertainty says nothing, since the model is wrong where it is certain;
    * "auxiliary loss": it is not finite, grows while the main loss does not, or stays worse than a guess;
    * "validation": the validation loss grows while the training loss falls.

        monitor = Monitor()
        monitor.update(entprop.training_step(model, images, labels))    # each step
        monitor.evaluated({"loss": validation_loss})                    # after each evaluation

    or ``Trainer(..., monitor=Monitor())``, where the numbers are those of the first process. Sums stay on the device
    and are read once in ``every`` steps. A monitor changes nothing, and is not part of checkpoints.

    Entropies are judged once their mean is below 0.9 log C. As a method that selects by entropy makes its selected
    images look uncertain by construction, "selection" has three rules:

    * the mean entropy of selected images is less than 5 % above that of all: finds a selection by another score;
    * by the energy ``-logsumexp(logits)`` (Liu et al., NeurIPS 2020), the AUROC of selected images against all, in the
      mean over steps, is not two standard errors above 1/2: finds images that are uncertain between classes that they
      all resemble much, which are typical images;
    * the main loss is no better than log C, the loss of a guess: finds logits that say nothing, which no score of the
      logits alone can, as the flattest of random logits have the highest energy too.

    Thresholds are judgements, not from a paper; the constants of this module are the others. Each must hold three
    times in a row, except for losses that are not finite. Where the loss is not cross-entropy, those in
    log C mean little.

    Args:
        every: Steps between two looks; what is judged are the means over them.

    Attributes:
        warnings: The warnings so far, by signature.

    Raises:
        ConfigurationError: ``every`` is not an integer of at least 1.
    """

    def __init__(self, *, every: int = 50) -> None:
        self.every = check_integer("every", every, 1)
        self.warnings: dict[str, str] = {}
        self._steps = self._window_steps = self._window_auxiliary = 0
        self._window: Tensor | None = None  # on the device: sums of values, then how often each was finite
        self._since: Tensor | None = None  # the same since the last evaluation
        self._classes = 2
        self._lowest_aux = self._main_then = math.inf
        self._in_a_row: Counter[str] = Counter()  # of looks at which a rule held
        self._evaluations: list[tuple[float, float]] = []  # validation loss, training loss

    def update(self, output: StepOutput) -> None:
        """Take in one training step."""
        if not isinstance(output, StepOutput):
            raise TypeError(f"update() expects what training_step() returns, found {type(output).__name__}.")
        nothing = torch.zeros_like(output.main_loss)
        aux = nothing + torch.nan if output.aux_loss is None else output.aux_loss  # none: no part of the mean
        selected = further = nothing
        if output.selected is not None:
            selected = output.entropy[output.selected].mean()
            further = _energy_auroc(output.logits, output.selected)
        found = (output.main_loss, aux, output.entropy.mean(), selected, further, further**2)
        values = torch.stack([value.detach().float() for value in found])
        finite = values.isfinite()
        both = torch.cat([torch.where(finite, values, 0.0), finite.float()])
        self._window = both if self._window is None else self._window + both
        self._since = both if self._since is None else self._since + both
        self._classes = output.logits.shape[1]
        self._steps += 1
        self._window_steps += 1
        self._window_auxiliary += output.aux_loss is not None
        if self._window_steps >= self.every:
            sums, auxiliary = self._window.tolist(), self._window_auxiliary
            self._window, self._window_steps, self._window_auxiliary = None, 0, 0
            self._judge(sums, auxiliary, output.selected is not None)

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Take in an evaluation: a mapping with "loss" (or "eval_loss") on data that is not trained on.

        Raises:
            ConfigurationError: There is no such number.
        """
        found = metrics.get("loss", metrics.get("eval_loss")) if isinstance(metrics, Mapping) else None
        if found is None:
            raise ConfigurationError(
                f"evaluated() expects a mapping with 'loss', found {shown(metrics)}. Write evaluated({{'loss': loss}})."
            )
        if self._since is None:
            return  # nothing was trained in between
        sums, self._since = self._since.tolist(), None
        if sums[_VALUES]:
            self._evaluations.append((float(found), sums[0] / sums[_VALUES]))
            self._judge_validation()

    def _judge(self, sums: list[float], auxiliary: int, selection: bool) -> None:
        lost = auxiliary - int(sums[_VALUES + 1])
        if lost:
            self._warn(
                "auxiliary loss",
                f"The auxiliary loss was not finite in {lost} of the last {auxiliary} steps. Lower the learning rate, "
                "clip gradients, or use bf16 for fp16.",
            )
        numbers = sums[_VALUES:]
        numbers[1] = numbers[1] if auxiliary else 1.0
        if 0 in numbers:
            return  # no mean to judge
        main, aux, entropy, selected, further, square = (
            total / number for total, number in zip(sums[:_VALUES], numbers, strict=True)
        )
        if selection:
            error = math.sqrt(max(square - further**2, 0) / max(sums[_VALUES + 4] - 1, 1))
            self._judge_selection(main, entropy, selected, further, error)
        if auxiliary:
            self._judge_auxiliary(main, aux)

    def _judge_selection(self, main: float, entropy: float, selected: float, further: float, error: float) -> None:
        guess = math.log(self._classes)
        began = entropy < _UNLEARNT * guess
        long = f"for {_PATIENCE} times {self.every} steps"
        if self._again("guess", began and main >= guess):
            self._warn(
                "selection",
                f"Selected images are no further out of the distribution than random ones: the main loss of {main:.3g} "
                f"is no better than a guess ({guess:.3g}) at a mean entropy of {entropy:.3g} nats, {long}, so entropy "
                "says nothing. Check labels and data, or lower the learning rate. (Ignore this for other losses.)",
            )
        if self._again("entropy", began and selected - entropy <= _LEAST_LEAD * entropy):
            self._warn(
                "selection",
                f"Selected images are no more uncertain than random ones: mean entropy {selected:.3g} against "
                f"{entropy:.3g} nats of all, {long}. Select fewer (fraction=), by another uncertainty=, or mix; if all "
                "entropies are near 0, train for less long, or regularise.",
            )
        if self._again("energy", began and further - _ERRORS * error <= 0.5):
            self._warn(
                "selection",
                f"Selected images are no further out of the distribution than random ones: by the energy, their AUROC "
                f"is {further:.3g} ± {_ERRORS * error:.2g}, where a coin has 0.5, {long}. Select fewer (fraction=), by "
                "another uncertainty=, or look at entprop_wrap.diagnostics.selection_ood.",
            )

    def _judge_auxiliary(self, main: float, aux: float) -> None:
        guess = math.log(self._classes)
        if aux < self._lowest_aux:
            self._lowest_aux, self._main_then = aux, main
        growth = aux - self._lowest_aux
        grows = aux > _GROWTH * self._lowest_aux and growth > _GROWTH_SHARE * guess
        if self._again("grows", grows and main - self._main_then < growth / 2):
            self._warn(
                "auxiliary loss",
                f"The auxiliary loss has grown from {self._lowest_aux:.3g} to {aux:.3g}, while the main loss went from "
                f"{self._main_then:.3g} to {main:.3g}. Lower epsilon, attack_steps or the learning rate, or clip "
                "gradients.",
            )
        if self._again("worse", aux > _WORSE_THAN_CHANCE * guess and main < guess):
            self._warn(
                "auxiliary loss",
                f"The auxiliary loss stays at {aux:.3g}, worse than a guess ({guess:.3g}), with a main loss of "
                f"{main:.3g}. Check that the optimizer trains the auxiliary norms, have 8 or more auxiliary images a "
                "step, and lower epsilon.",
            )

    def _judge_validation(self) -> None:
        losses = [loss for loss, _ in self._evaluations]
        best = min(range(len(losses)), key=lambda index: losses[index] if math.isfinite(losses[index]) else math.inf)
        lowest, train_then = self._evaluations[best]
        limit = max(_PART * lowest, lowest + _PART_SHARE * math.log(self._classes))
        later = self._evaluations[best + 1 :][-_PATIENCE:]
        if len(later) == _PATIENCE and all(loss > limit and train < train_then for loss, train in later):
            now, train_now = later[-1]
            self._warn(
                "validation",
                f"Training and validation part: since evaluation {best + 1} the validation loss has gone from "
                f"{lowest:.3g} to {now:.3g}, and the training loss from {train_then:.3g} to {train_now:.3g}. Keep the "
                "earlier weights, train for less long, or regularise.",
            )

    def _again(self, key: str, holds: bool) -> bool:
        self._in_a_row[key] = self._in_a_row[key] + 1 if holds else 0
        return self._in_a_row[key] >= _PATIENCE

    def _warn(self, signature: str, message: str) -> None:
        if signature not in self.warnings:
            self.warnings[signature] = f"{message} (step {self._steps})"
            warnings.warn(self.warnings[signature], stacklevel=5)


def _energy_auroc(logits: Tensor, selected: Tensor) -> Tensor:
    """Return the share of images (ties one half) that have less energy than a selected one, without any waiting."""
    energy = -logits.detach().float().logsumexp(dim=1)
    # sign() takes NaN for a tie; the last term is 0, or NaN where an energy is NaN.
    return (energy[selected][:, None] - energy).sign().mean() / 2 + 0.5 + 0 * energy.sum()
