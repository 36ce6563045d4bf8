"""EntProp, or any other method of this library, in Lightning.

    trainer = L.Trainer(callbacks=[EntPropLightningCallback(EntProp(fraction=0.2), pixel_space=space)])
    trainer.fit(module, loader)

Lightning calls ``training_step``, then zeroes gradients, then runs one backward, which under DDP must come after the
forward of the container. A method has several backwards. So they all run in ``training_step``, where DDP does not
reduce yet, after gradients were zeroed there; and the loss that Lightning is given has a backward that adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import LBFGS

from entprop_wrap.data.batches import images_and_labels
from entprop_wrap.data.pixel_space import PixelSpace, space_of
from entprop_wrap.errors import CheckpointError, ConfigurationError, DataError, UnsupportedModelError
from entprop_wrap.functional.losses import Loss, Pass
from entprop_wrap.methods import EntProp
from entprop_wrap.methods.base import Method, check_method
from entprop_wrap.methods.lagged import lagged_state, load_lagged_state
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.training import training_step
from entprop_wrap.utils.modules import plain_model, replaced
from entprop_wrap.utils.options import asked
from entprop_wrap.wrapping.model import ensure_wrapped, is_wrapped, unwrap
from entprop_wrap.wrapping.optimizer import check_optimizer
from entprop_wrap.wrapping.state_dict import auxiliary_names, load_auxiliary_state_dict

__all__ = ["EntPropLightningCallback"]

#: Where a Lightning checkpoint holds the auxiliary copies; its ``state_dict`` is the plain module's.
_AUXILIARY = "entprop_auxiliary"
#: Where it holds what waits for the next lagged step of each process.
_LAGGED = "entprop_lagged"


class EntPropLightningCallback(Callback):
    """Makes ``trainer.fit`` train with a method of this library; automatic optimization, one process or DDP.

    A plain model is wrapped when ``fit`` begins, before ``configure_optimizers``, and unwrapped when it ends. After the
    passes of the method, the module's own ``training_step`` runs without gradients on the logits of the main pass (in
    EntProp: of the mixed images), for its logs and for a check of its loss. Lightning sees the loss that is minimised;
    ``main_loss``, ``aux_loss``, ``main_entropy`` and ``aux_entropy`` are logged beside it.

    Checkpoints written by ``fit`` hold the plain module, and the copies under a key of their own, from which
    ``fit(ckpt_path=...)`` resumes exactly. Another ``fit`` without it starts from the plain module, with new copies.
    Hooks around the backward (``on_after_backward``, ...) run once a step, after the last backward.

    Args:
        method: An instance of a training method; ``EntProp()`` by default.
        pixel_space: Normalisation of the images; None: they are in [0, 1].
        model: Name of the part of the LightningModule that turns images into logits, or ``"self"`` for its own
            ``forward``. None: ``model`` if there is one, else ``"self"``.
        loss: ``(logits, labels) -> scalar mean``, which may ask for more as in ``training_step``. None: the module's
            ``criterion`` or ``loss_fn``, else cross-entropy, with an error if ``training_step`` returns anything else.

    Raises:
        ConfigurationError: When ``fit`` begins: no classifier was found, or another callback stands in the way.
        DataError: In a step: the batch is not ``(images, labels)`` or a dict with both.
        UnsupportedModelError: When ``fit`` begins: manual optimization, LBFGS, a strategy other than one device or DDP,
            ``sync_batchnorm=True``. At the first batch: ``training_step`` changes the images, does not call the model
            exactly once, or computes another loss.
        CheckpointError: ``fit(ckpt_path=...)`` of a checkpoint without copies.
    """

    def __init__(
        self,
        method: Method | None = None,
        *,
        pixel_space: PixelSpace | None = None,
        model: str | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.method: Method = EntProp() if method is None else check_method(method)
        self.pixel_space, self.model, self.loss = space_of(pixel_space), model, loss
        self._fit: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Prepare the module, whose model is wrapped as soon as it is complete."""
        if stage == "fit":
            self.teardown()
            _refuse(trainer, pl_module, self)
            self._fit = _Fit(self, trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizer, and load what waits for a lagged step: the model is on its device by now."""
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise UnsupportedModelError("LBFGS needs one fixed loss; a step here draws another each time. Use AdamW.")
        if self.method.auxiliaries:
            check_optimizer(pl_module, trainer.optimizers[0])
        if (waiting := self._fit.waiting) is not None:
            same = len(waiting) == trainer.world_size  # other processes have other batches
            load_lagged_state(self._fit.classifier, waiting[trainer.global_rank] if same else {})

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Give the module back as it was."""
        fit, self._fit = self._fit, None
        if fit is not None:
            fit.end()

    on_exception = teardown

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add what waits for the next lagged step of each process."""
        waiting = lagged_state(self._fit.classifier) if self._fit is not None else None
        if waiting:
            everyone: list[Any] = [{key: value.cpu() for key, value in waiting.items()}]
            if trainer.world_size > 1:
                mine, everyone = everyone[0], everyone * trainer.world_size
                torch.distributed.all_gather_object(everyone, mine)
            checkpoint[_LAGGED] = everyone

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Load the copies of a checkpoint to resume from, after its plain weights."""
        if self._fit is None:
            return
        self._fit.waiting = checkpoint.get(_LAGGED, [])
        if not is_wrapped(pl_module):
            return
        if _AUXILIARY not in checkpoint:
            raise CheckpointError(
                "The checkpoint has no auxiliary copies: it was written without EntPropLightningCallback, or after "
                "fit. Start a new run from its weights: load_from_checkpoint(path), then fit() without ckpt_path."
            )
        load_auxiliary_state_dict(pl_module, checkpoint[_AUXILIARY])


class _Fit:
    """One ``fit``, during which the LightningModule has a class of ours with other hooks."""

    classifier: nn.Module
    waiting: list[dict[str, Tensor]] | None = None  # for a lagged step, in the checkpoint to resume from
    prepared = ours = False  # ours: wrapped here

    def __init__(self, callback: EntPropLightningCallback, trainer: Any, module: Any) -> None:
        self.callback, self.trainer, self.module = callback, trainer, module
        self.former = type(module)
        module.__class__ = _class_during_fit(self.former, self)

    def end(self) -> None:
        """Give the module its class back, and unwrap the model if it was wrapped here; nothing waits any longer."""
        self.module.__class__ = self.former
        if self.prepared:
            load_lagged_state(self.classifier, {})
        if self.ours:
            unwrap(self.classifier)

    def prepare(self) -> None:
        """Wrap the model after the module has made it: the last moment before there are optimizers."""
        if self.prepared:
            return
        callback = self.callback
        self.name, self.classifier = _find_classifier(self.module, callback.model)
        self.ours = ensure_wrapped(self.classifier, callback.method)
        self.model = _ModelInContext(self.classifier, self.trainer.precision_plugin.forward_context)
        own = getattr(self.module, "criterion", None) or getattr(self.module, "loss_fn", None)
        self.loss: Loss = callback.loss or (own if callable(own) else F.cross_entropy)
        if callback.loss is None and (more := asked(self.loss, Pass.__dataclass_fields__, 2)):
            raise ConfigurationError(
                f"The loss of {self.former.__name__} asks for {', '.join(sorted(more))} beside logits and labels: "
                "write EntPropLightningCallback(..., loss=)."
            )
        self.prepared = True

    def step(self, own: Any, batch: Any, batch_idx: int) -> Any:
        """Run the passes of the method; return the loss that was minimised, in what the module's own step returns."""
        trainer, (images, labels) = self.trainer, _read_batch(batch)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            own.optimizer_zero_grad(trainer.current_epoch, batch_idx, trainer.optimizers[0])
        self.model.training = self.classifier.training
        with torch.autocast(images.device.type, enabled=False):  # the model has it, backwards have not
            output = training_step(
                self.model,
                images,
                labels,
                method=self.callback.method,
                pixel_space=self.callback.pixel_space,
                loss=self.loss,
                backward=self._backward,
            )
        look = images.device.type == "cpu" or batch_idx % trainer.log_every_n_steps == 0
        if look and output.checker is not None:
            output.checker.raise_pending()
        result = self._own_step(own, batch, batch_idx, output, check=look and self.callback.loss is None)
        values = {name: value for name, value in output.scalars().items() if name != "loss"}
        self.module.log_dict(values, batch_size=len(output.logits))
        loss = self._already_done(output.loss)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _backward(self, loss: Tensor) -> None:
        # As Lightning does it, without the hooks around a backward, which come once and last.
        plugin, trainer = self.trainer.precision_plugin, self.trainer
        loss = loss / trainer.accumulate_grad_batches
        if getattr(plugin, "scaler", None) is not None:
            loss = plugin.scaler.scale(loss)
        plugin.backward(loss, self.module, trainer.optimizers[0])

    def _own_step(self, own: Any, batch: Any, batch_idx: int, output: StepOutput, check: bool) -> Any:
        """Run the module's own step on the logits of the main pass, and ``check`` that its loss is the one trained."""
        batch = _first_rows(batch, len(output.logits))
        images, labels = _read_batch(batch)
        known = _KnownOutput(type(plain_model(self.classifier)).__name__, images, self.model.in_its_form(output.logits))
        index = [batch_idx] if is_param_in_hook_signature(own.training_step, "batch_idx", min_args=2) else []
        # A compiled model would be compiled anew in each step.
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            replaced(vars(self.classifier), "forward", known),
        ):
            result = own.training_step(batch, *index)
            targets = labels if labels.is_floating_point() else labels.long()
            expected: Any = self.loss(output.logits, targets) if check else None
        loss = result.get("loss") if isinstance(result, Mapping) else result
        where = f"training_step of {self.former.__name__}"
        if known.calls != 1:
            what = "forward()" if self.name == "self" else repr(self.name)
            raise UnsupportedModelError(
                f"{where} called {what} {known.calls} times, expected once. If another part turns images into "
                "logits, write EntPropLightningCallback(..., model=<its name>)."
            )
        if not isinstance(loss, Tensor) or loss.ndim:
            raise UnsupportedModelError(
                f"{where} returned {type(loss).__name__}, expected a scalar loss or a dict with one under 'loss'. A "
                "batch cannot be skipped."
            )
        if check and not torch.allclose(loss.float(), expected.float(), rtol=1e-4, atol=1e-6, equal_nan=True):
            name = getattr(self.loss, "__name__", type(self.loss).__name__)
            raise UnsupportedModelError(
                f"{where} returns {loss.item():.6g} where {name} is {expected.item():.6g}. Write "
                "EntPropLightningCallback(..., loss=<function of logits, labels>)."
            )
        return result

    def _already_done(self, loss: Tensor) -> Tensor:
        """Return a loss whose backward adds nothing, but reaches what DDP has to reduce, the same on all processes."""
        reached = [loss.new_zeros(()).requires_grad_()]  # something has to be differentiable, with one process too
        if isinstance(self.trainer.strategy, DDPStrategy):
            copies = auxiliary_names(self.module)
            for name, parameter in self.module.named_parameters():
                if parameter.requires_grad and (parameter.grad is not None or name in copies):
                    reached.append(parameter)
        result: Tensor = _AlreadyDone.apply(loss, *reached)
        return result


class _AlreadyDone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *reached: Tensor) -> Tensor:
        ctx.number = 1 + len(reached)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        return (None,) * int(ctx.number)


class _ModelInContext(nn.Module):
    """The classifier as the step calls it: in the precision plugin's context, which is autocast or nothing."""

    def __init__(self, model: nn.Module, context: Callable[[], Any]) -> None:
        super().__init__()
        self._orig_mod = model  # the name that compiled modules use: whatever looks for the plain model finds it
        self.context = context
        self.form: type = Tensor

    def forward(self, images: Tensor) -> Any:
        with self.context():
            output = self._orig_mod(images)
        self.form = type(output)
        return output

    def in_its_form(self, logits: Tensor) -> Any:
        """Return ``logits`` as the model returned its last output."""
        if issubclass(self.form, Tensor):
            return logits
        if issubclass(self.form, tuple):
            return (logits,)
        # Outputs of transformers are dicts, too: .logits, ["logits"] and [0] work on them.
        return self.form(logits=logits) if issubclass(self.form, dict) else SimpleNamespace(logits=logits)


class _KnownOutput:
    """A ``forward`` of a model whose ``output`` on ``images`` is known; it counts its ``calls``."""

    def __init__(self, name: str, images: Tensor, output: Any) -> None:
        self.name, self.images, self.output = name, images, output
        self.calls = 0

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        self.calls += 1
        if inputs.get("labels") is not None:
            raise UnsupportedModelError(
                f"training_step lets {self.name} compute the loss, which is impossible for mixed or selected images. "
                "Write torch.nn.functional.cross_entropy(self.model(images).logits, labels)."
            )
        given, known = args[0] if args else next(iter(inputs.values()), None), self.images
        same = isinstance(given, Tensor) and given.dtype == known.dtype and torch.equal(given, known)
        if given is not known and not same:
            raise UnsupportedModelError(
                f"training_step gives {self.name} other images than the batch holds. Change them before, in the "
                "dataset or in the module's on_after_batch_transfer."
            )
        return self.output


def _class_during_fit(former: type, fit: _Fit) -> type:
    class DuringFit(former):  # type: ignore[misc, valid-type]
        def configure_model(self) -> None:
            super().configure_model()
            if self is fit.module:  # a deep copy of the module has its class
                fit.prepare()

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state, copies = checkpoint["state_dict"], auxiliary_names(self)
            if copies:
                checkpoint["state_dict"] = {key: value for key, value in state.items() if key not in copies}
                checkpoint[_AUXILIARY] = {key: value for key, value in state.items() if key in copies}
            super().on_save_checkpoint(checkpoint)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return fit.step(super(), batch, batch_idx)

        def optimizer_zero_grad(self, *args: Any) -> None:
            """Do nothing: Lightning calls this when the gradients of the step are there."""

        def __reduce_ex__(self, protocol: Any) -> Any:
            """Return what copies and pickles are made of: they have the module's own class."""
            _, _, *state = super().__reduce_ex__(protocol)
            return (object.__new__, (former,), *state)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(DuringFit, name, getattr(former, name))
    return DuringFit


def _refuse(trainer: Any, module: Any, callback: Any) -> None:
    """Raise for what is not tested or cannot be right, when ``fit`` begins."""
    if not isinstance(module, LightningModule):
        raise ConfigurationError(
            f"Expected a LightningModule of `lightning`, found a {type(module).__name__}. Write `import lightning as "
            "L`, and L.LightningModule for that of pytorch_lightning."
        )
    if any(type(other) is type(callback) and other is not callback for other in trainer.callbacks):
        raise ConfigurationError("The Trainer has two EntPropLightningCallbacks. Expected one, with one method.")
    strategy, kind = trainer.strategy, type(trainer.strategy)
    static_graph = getattr(strategy, "_ddp_kwargs", {}).get("static_graph")
    averaging = {"StochasticWeightAveraging", "WeightAveraging"}
    averages = [type(c).__name__ for c in trainer.callbacks if averaging & {b.__name__ for b in type(c).__mro__}]
    for found, what, instead in (
        (not module.automatic_optimization, "manual optimization", "entprop.training_step(self.model, images, labels, "
         "backward=self.manual_backward) in training_step, and leave the callback out"),
        (static_graph, f"{kind.__name__} with a static graph", "strategy='ddp'"),
        (kind not in (SingleDeviceStrategy, DDPStrategy), kind.__name__,
         "strategy='ddp'; entprop.Trainer also trains under FSDP2"),
        (getattr(strategy, "_layer_sync", None), "sync_batchnorm=True",
         "nn.SyncBatchNorm.convert_sync_batchnorm(model) where the model is made"),
        (getattr(module, "_compiler_ctx", None), "a compiled LightningModule",
         "self.model = torch.compile(entprop.wrap(model)) in it"),
        (averages, ", ".join(averages), "entprop.TrainerConfig(ema_decay=...): entprop.Trainer averages weights"),
        (is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True), "dataloader_iter",
         "training_step(batch, batch_idx)"),
    ):  # fmt: skip
        if found:
            raise UnsupportedModelError(f"EntPropLightningCallback does not work with {what}. Write {instead}.")
    hooks = ("configure_model", "on_save_checkpoint", "training_step", "optimizer_zero_grad")
    if changed := [name for name in hooks if name in vars(module)]:
        raise ConfigurationError(f"The module has {changed[0]} as an attribute. Override it in a subclass instead.")


def _find_classifier(module: Any, name: str | None) -> tuple[str, nn.Module]:
    """Return the name and the module that turns images into logits: a part, or ``"self"``."""
    if name is None:
        name = "model" if isinstance(getattr(module, "model", None), nn.Module) else "self"
    if name == "self" and is_overridden("forward", module):
        return name, module
    if (found := dict(module.named_modules()).get(name)) is not None:
        return name, found
    children = ", ".join(repr(child) for child, _ in module.named_children()) or "none"
    raise ConfigurationError(
        f"{type(module).__name__} has no {'forward()' if name == 'self' else repr(name)}; its parts are {children}. "
        "Write EntPropLightningCallback(..., model=<the part that turns images into logits, or 'self'>)."
    )


def _read_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """Return images and labels, which must be the only tensors."""
    images, labels = images_and_labels(batch, "training_step")
    values = batch.values() if isinstance(batch, Mapping) else ()
    if sum(isinstance(value, Tensor) and value.ndim > 0 for value in values) > 2:
        raise DataError(
            f"training_step: found a dict with {', '.join(map(repr, batch))}. Images are mixed and selected: leave out "
            "tensors that cannot follow, in the dataset or in on_after_batch_transfer."
        )
    return images, labels


def _first_rows(batch: Any, rows: int) -> Any:
    """Return the first rows of a batch that :func:`_read_batch` accepts."""
    if isinstance(batch, Mapping):
        return {k: v[:rows] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}
    return type(batch)([item[:rows] for item in batch])
