"""EntProp, or any other method of this library, in Lightning.

    trainer = L.Trainer(callbacks=[EntPropLightningCallback(EntProp(fraction=0.2), pixel_space=space)])
    trainer.fit(module, loader)

The LightningModule stays as it is: its ``training_step`` goes on logging and says what the loss is. Accumulation,
clipping, mixed precision, processes, schedule and evaluation stay Lightning's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback
from torch import nn

from entprop_wrap.errors import AuxiliaryNameError
from entprop_wrap.integrations.lightning_checks import refuse, refuse_optimizers
from entprop_wrap.integrations.lightning_files import AUXILIARY_KEY, Copies, separate
from entprop_wrap.integrations.lightning_run import LightningRun
from entprop_wrap.losses import Loss
from entprop_wrap.methods import EntProp
from entprop_wrap.norms import Selector
from entprop_wrap.optimizers import check_optimizer
from entprop_wrap.perturbation import PixelSpace
from entprop_wrap.registry import find_registry
from entprop_wrap.step import Method, check_method
from entprop_wrap.wrapping import is_wrapped, wrap

__all__ = ["AUXILIARY_KEY", "EntPropLightningCallback"]


class EntPropLightningCallback(Callback):
    """Makes ``trainer.fit`` train with a method of this library; automatic optimization, one process or DDP.

    The model is wrapped when ``fit`` begins, before ``configure_optimizers``, and unwrapped when it ends. The images of
    a batch, which is ``(images, labels)`` or a dict with both, go through the passes of the method; then the
    module's own ``training_step`` runs, without gradients, on the logits of the main pass in place of the model: what
    it logs is about that pass (in EntProp: of the mixed images). The loss it returns is compared with the one that is
    trained on. ``main_loss``, ``aux_loss``, ``main_entropy`` and ``aux_entropy`` are logged beside it, and the
    loss that Lightning sees is the one that is minimised.

    Checkpoints hold the plain module, for ``load_from_checkpoint`` and ``ckpt_path="best"``, and the copies under a key
    of their own, from which ``fit(ckpt_path=...)`` goes on exactly. A second ``fit`` of the same module goes on with
    the copies of the first. Hooks around the backward (``on_after_backward``, ...) run once a step, after the last
    backward; gradients are zeroed before the first, so that ``on_before_zero_grad`` finds new ones.

    Args:
        method: An instance of a training method; ``EntProp()`` by default.
        pixel_space: How the images are normalised; None: they are in [0, 1].
        model: Name of the attribute of the LightningModule that is the classifier, images in and logits out, or
            ``"self"`` for the LightningModule's own ``forward``. None: the attribute ``model`` if there is one, else
            ``"self"`` if there is a ``forward``.
        loss: ``(logits, labels) -> scalar mean``. None: the module's ``criterion`` or ``loss_fn``, else cross-entropy,
            and an error at the first batch if ``training_step`` returns anything else. A loss given here is what is
            trained on, whatever ``training_step`` returns.
        include: As in ``entprop.wrap``.
        exclude: Likewise.

    Raises:
        ConfigurationError: When ``fit`` begins: the classifier cannot be told, or another callback stands in the way.
        UnsupportedModelError: Likewise: manual optimization, LBFGS, a strategy other than one device or DDP,
            ``sync_batchnorm=True``. At the first batch: ``training_step`` does something to the images before the model
            sees them, calls the model more or less than once, or computes another loss.
        CheckpointError: ``fit(ckpt_path=...)`` of a checkpoint without copies.
    """

    def __init__(
        self,
        method: Method | None = None,
        *,
        pixel_space: PixelSpace | None = None,
        model: str | None = None,
        loss: Loss | None = None,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
    ) -> None:
        self.method = EntProp() if method is None else check_method(method)
        self.pixel_space, self.model, self.loss = pixel_space, model, loss
        self.selectors = {"include": include, "exclude": exclude}
        self._run: LightningRun | None = None
        self._kept: Copies | None = None

    def wrap(self, model: nn.Module) -> bool:
        """Wrap the classifier if the method needs it, and say whether that was done here."""
        names = tuple(self.method.auxiliaries)
        if not names:
            return False
        if is_wrapped(model):  # by the user, who has options of their own
            if missing := set(names) - set(find_registry(model).auxiliaries):
                raise AuxiliaryNameError(
                    f"The model was wrapped without the auxiliary {sorted(missing)[0]!r} that "
                    f"{type(self.method).__name__} needs. Write wrap(model, auxiliaries={names!r})."
                )
            return False
        wrap(model, auxiliaries=names, **self.selectors)
        return True

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Prepare the module, whose model is wrapped as soon as it is complete."""
        if stage == "fit":
            self._end()
            refuse(trainer, pl_module, self)
            self._run, self._kept = LightningRun(self, trainer, pl_module, self._kept), None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizer."""
        refuse_optimizers(trainer.optimizers)
        if self.method.auxiliaries:
            check_optimizer(pl_module, trainer.optimizers[0])

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module back as it was."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Likewise."""
        self._end()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the copies into a checkpoint that is written after ``fit``."""
        separate(checkpoint)
        if self._kept is not None and self._kept.belong_to(pl_module):
            checkpoint[AUXILIARY_KEY] = self._kept.auxiliary

    def _end(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            self._kept = run.end()
