"""EntProp, or any other method of this library, in Lightning.

    trainer = L.Trainer(callbacks=[EntPropLightningCallback(EntProp(fraction=0.2), pixel_space=space)])
    trainer.fit(module, loader)

The LightningModule stays as it is: its ``training_step`` continues to log and says what the loss is. Accumulation,
clipping, mixed precision, processes, schedule and evaluation stay Lightning's.

Lightning calls ``training_step``, then zeroes gradients, then runs one backward, which under DDP must come after the
forward of the container. A method has several backwards. So they all run in ``training_step``, where DDP does not
reduce yet, after gradients were zeroed there; and the loss that Lightning is given has a backward that adds nothing.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim import LBFGS

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from entprop_wrap.functional.losses import Loss, Pass, asked
from entprop_wrap.methods import EntProp
from entprop_wrap.methods.base import Method, check_method
from entprop_wrap.methods.lagged import lagged_state, load_lagged_state
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.training import training_step
from entprop_wrap.utils.modules import plain_model
from entprop_wrap.wrapping.model import ensure_wrapped, is_wrapped, unwrap
from entprop_wrap.wrapping.norm_layers import Selector
from entprop_wrap.wrapping.optimizer import check_optimizer
from entprop_wrap.wrapping.registry import find_registry
from entprop_wrap.wrapping.state_dict import auxiliary_state_dict, load_auxiliary_state_dict

__all__ = ["AUXILIARY_KEY", "EntPropLightningCallback"]

#: Where a Lightning checkpoint holds the auxiliary copies; its ``state_dict`` is the plain module's.
AUXILIARY_KEY = "entprop_auxiliary"
#: Where it holds what waits for the next lagged step of each process.
_LAGGED_KEY = "entprop_lagged"
_IMAGES = ("pixel_values", "images", "image")
_LABELS = ("labels", "label")
_HOOKS = ("configure_model", "on_save_checkpoint", "on_load_checkpoint", "training_step", "optimizer_zero_grad")


class EntPropLightningCallback(Callback):
    """Makes ``trainer.fit`` train with a method of this library; automatic optimization, one process or DDP.

    The model is wrapped when ``fit`` begins, before ``configure_optimizers``, and unwrapped when it ends. The images of
    a batch, which is ``(images, labels)`` or a dict with both, go through the passes of the method; then the
    module's own ``training_step`` runs, without gradients, on the logits of the main pass in place of the model: what
    it logs is about that pass (in EntProp: of the mixed images). The loss it returns is compared with the one that is
    trained on. ``main_loss``, ``aux_loss``, ``main_entropy`` and ``aux_entropy`` are logged beside it, and the
    loss that Lightning sees is the one that is minimised.

    Checkpoints hold the plain module, for ``load_from_checkpoint`` and ``ckpt_path="best"``, and the copies under a key
    of their own, from which ``fit(ckpt_path=...)`` resumes exactly. A second ``fit`` of the same module continues with
    the copies of the first. Hooks around the backward (``on_after_backward``, ...) run once a step, after the last
    backward; gradients are zeroed before the first, so that ``on_before_zero_grad`` finds new ones.

    Args:
        method: An instance of a training method; ``EntProp()`` by default.
        pixel_space: How the images are normalised; None: they are in [0, 1].
        model: Name of the attribute of the LightningModule that is the classifier, images in and logits out, or
            ``"self"`` for the LightningModule's own ``forward``. None: the attribute ``model`` if there is one, else
            ``"self"`` if there is a ``forward``.
        loss: ``(logits, labels) -> scalar mean``, which may ask for more as in ``training_step``. None: the module's
            ``criterion`` or ``loss_fn``, else cross-entropy, and an error at the first batch if the module's
            ``training_step`` returns anything else. A loss given here is what is trained on, whatever that returns.
        include: As in ``entprop.wrap``.
        exclude: As in ``entprop.wrap``.

    Raises:
        ConfigurationError: When ``fit`` begins: the classifier cannot be told, or another callback stands in the way.
        UnsupportedModelError: When ``fit`` begins: manual optimization, LBFGS, a strategy other than one device or DDP,
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
        self.method: Method = EntProp() if method is None else check_method(method)
        self.pixel_space, self.model, self.loss = pixel_space, model, loss
        self.selectors: dict[str, Any] = {"include": include, "exclude": exclude}
        self._fit: _Fit | None = None
        self._kept: _Copies | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Prepare the module, whose model is wrapped as soon as it is complete."""
        if stage == "fit":
            self._end()
            _refuse(trainer, pl_module, self)
            self._fit, self._kept = _Fit(self, trainer, pl_module, self._kept), None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizer, and let wait what did in the checkpoint: the model is on its device by now."""
        if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
            raise UnsupportedModelError(
                "LBFGS searches along lines of one fixed loss; every step of a method here draws another. Use SGD or "
                "AdamW."
            )
        if self.method.auxiliaries:
            check_optimizer(pl_module, trainer.optimizers[0])
        if self._fit is not None and (waiting := self._fit.waiting) is not None:
            assert self._fit.classifier is not None
            same = len(waiting) == trainer.world_size  # other processes have other batches
            load_lagged_state(self._fit.classifier, waiting[trainer.global_rank] if same else {})

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module back as it was."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the module back as it was."""
        self._end()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put what waits for a lagged step, and after ``fit`` the copies, into a checkpoint to resume from."""
        _separate(checkpoint, pl_module)
        if self._kept is not None and self._kept.belong_to(pl_module):
            checkpoint[AUXILIARY_KEY] = self._kept.auxiliary
        _add_waiting(checkpoint, pl_module)

    def _end(self) -> None:
        fit, self._fit = self._fit, None
        if fit is not None:
            self._kept = fit.end()


class _Fit:
    """One ``fit``: what takes the place of hooks of the LightningModule, by a class of its own, until it ends."""

    def __init__(self, callback: EntPropLightningCallback, trainer: Any, module: Any, kept: _Copies | None) -> None:
        self.callback, self.trainer, self.module, self.kept = callback, trainer, module, kept
        self.former = type(module)
        self.classifier: nn.Module | None = None
        self.ours = False  # wrapped here
        self.waiting: list[dict[str, Tensor]] | None = None  # for a lagged step, in the checkpoint to resume from
        module.__class__ = _class_during_fit(self.former, self)

    def end(self) -> _Copies | None:
        """Give the module its class back, unwrap the model if it was wrapped here, and return its copies."""
        self.module.__class__ = self.former
        if not self.ours:
            return None
        assert self.classifier is not None
        copies = _Copies(self.module, self.classifier)
        unwrap(self.classifier)
        return copies

    def prepare(self) -> None:
        """Wrap the model after the module has made it: the last moment before there are optimizers."""
        if self.classifier is not None:
            return
        callback = self.callback
        self.name, self.classifier = _find_classifier(self.module, callback.model)
        self.ours = ensure_wrapped(self.classifier, callback.method, **callback.selectors)
        if self.ours and self.kept is not None and self.kept.belong_to(self.module):
            load_auxiliary_state_dict(self.module, self.kept.auxiliary)
        self.model = _ModelInContext(self.classifier, self.trainer.precision_plugin.forward_context)
        own = getattr(self.module, "criterion", None) or getattr(self.module, "loss_fn", None)
        self.loss: Loss = callback.loss or (own if callable(own) else F.cross_entropy)
        if callback.loss is None and (more := asked(self.loss, Pass.__dataclass_fields__, 2)):
            raise ConfigurationError(
                f"The loss of {self.former.__name__} asks for {', '.join(sorted(more))} beside logits and labels; what "
                "training_step returns cannot be compared with it. Write EntPropLightningCallback(..., loss=)."
            )
        self.mean = _in_context(self.loss, self.trainer.precision_plugin.forward_context)

    def step(self, own: Any, batch: Any, batch_idx: int) -> Any:
        """Run the passes of the method; return the loss that was minimised, in what the module's own step returns."""
        trainer, (images, labels) = self.trainer, _read_batch(batch)
        assert self.classifier is not None
        if batch_idx % trainer.accumulate_grad_batches == 0:
            own.optimizer_zero_grad(trainer.current_epoch, batch_idx, trainer.optimizers[0])
        self.model.training = self.classifier.training
        with torch.autocast(images.device.type, enabled=False):  # the model and the loss have it, backwards have not
            output = training_step(
                self.model,
                images,
                labels,
                method=self.callback.method,
                pixel_space=self.callback.pixel_space,
                loss=self.mean,
                backward=self._backward,
            )
        look = images.device.type == "cpu" or batch_idx % trainer.log_every_n_steps == 0
        if look and output.checker is not None:
            output.checker.raise_pending()
        result = self._own_step(own, batch, batch_idx, output, check=look and self.callback.loss is None)
        values = {"main_loss": output.main_loss, "main_entropy": output.entropy.mean()}
        if output.aux_loss is not None and output.aux_entropy is not None:
            values |= {"aux_loss": output.aux_loss, "aux_entropy": output.aux_entropy.mean()}
        self.module.log_dict(values, batch_size=len(output.logits))
        loss = _already_done(output.loss, self._reduced())
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _backward(self, loss: Tensor) -> None:
        # As Lightning does it, without the hooks around a backward, which come once and last.
        plugin, trainer = self.trainer.precision_plugin, self.trainer
        loss = loss / trainer.accumulate_grad_batches
        if getattr(plugin, "scaler", None) is not None:
            loss = plugin.scaler.scale(loss)
        plugin.backward(loss, self.module, trainer.optimizers[0])

    def _own_step(self, own: Any, batch: Any, batch_idx: int, output: StepOutput, check: bool) -> Any:
        batch = _rows_of(batch, len(output.logits))
        images, labels = _read_batch(batch)
        replacement = _LogitsOf(self.classifier, images, self.model.kind(output.logits))
        index = [batch_idx] if is_param_in_hook_signature(own.training_step, "batch_idx", min_args=2) else []
        with torch.no_grad(), _stand_in(self.module, self.name, replacement):
            result = own.training_step(batch, *index)
            expected = (
                self.mean(output.logits, labels if labels.is_floating_point() else labels.long()) if check else None
            )
        loss = result.get("loss") if isinstance(result, Mapping) else result
        where = f"training_step of {self.former.__name__}"
        if replacement.calls != 1:
            what = "forward()" if self.name == "self" else repr(self.name)
            raise UnsupportedModelError(
                f"{where} called {what} {replacement.calls} times. Expected one call, images in and logits out; if "
                "another part does that, write EntPropLightningCallback(..., model=<its name>)."
            )
        if not isinstance(loss, Tensor) or loss.ndim:
            raise UnsupportedModelError(
                f"{where} returned {'None' if loss is None else type(loss).__name__}. Expected a scalar loss, or a "
                "dict with one under 'loss'; a batch cannot be skipped after its passes."
            )
        if expected is not None and not torch.allclose(
            loss.float(), expected.float(), rtol=1e-4, atol=1e-6, equal_nan=True
        ):
            kind = plain_model(self.loss) if isinstance(self.loss, nn.Module) else self.loss
            raise UnsupportedModelError(
                f"{where} returns {loss.item():.6g} on logits for which the loss, "
                f"{getattr(kind, '__name__', type(kind).__name__)}, is {expected.item():.6g}. Write "
                "EntPropLightningCallback(..., loss=) with the function of (logits, labels) to train on."
            )
        return result

    def _reduced(self) -> list[nn.Parameter]:
        if not isinstance(self.trainer.strategy, DDPStrategy):
            return []
        wrapped = is_wrapped(self.module)
        copies = {id(copy) for _, _, copy in find_registry(self.module).mirrors()} if wrapped else set()
        trained = (parameter for parameter in self.module.parameters() if parameter.requires_grad)
        return [parameter for parameter in trained if parameter.grad is not None or id(parameter) in copies]


def _class_during_fit(former: type, fit: _Fit) -> type:
    class DuringFit(former):  # type: ignore[misc, valid-type]
        def configure_model(self) -> None:
            super().configure_model()
            if self is fit.module:  # a deep copy of the module has its class
                fit.prepare()

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            _separate(checkpoint, self)
            super().on_save_checkpoint(checkpoint)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            super().on_load_checkpoint(checkpoint)
            if is_wrapped(self):
                _join(checkpoint, self)
            fit.waiting = checkpoint.get(_LAGGED_KEY, [])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return fit.step(super(), batch, batch_idx)

        def optimizer_zero_grad(self, *args: Any) -> None:
            """Do nothing: Lightning calls this when the gradients of the step are there."""

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(DuringFit, name, getattr(former, name))
    return DuringFit


# What a module and its batches must be like ---------------------------------------------------------------------------


def _refuse(trainer: Any, module: Any, callback: Any) -> None:
    """Raise for what is not tested or cannot be right, when ``fit`` begins."""
    if not isinstance(module, LightningModule):
        raise ConfigurationError(
            f"Expected a LightningModule of the package `lightning`, found a {type(module).__name__}. Write `import "
            "lightning as L`, and L.LightningModule and L.Trainer for those of pytorch_lightning."
        )
    if any(type(other) is type(callback) and other is not callback for other in trainer.callbacks):
        raise ConfigurationError("The Trainer has two EntPropLightningCallbacks. Expected one, with one method.")
    strategy = trainer.strategy
    averaging = {"StochasticWeightAveraging", "WeightAveraging"}
    averages = [type(c).__name__ for c in trainer.callbacks if averaging & {b.__name__ for b in type(c).__mro__}]
    static_graph = getattr(strategy, "_ddp_kwargs", {}).get("static_graph")
    problems = [
        (
            not module.automatic_optimization,
            "EntPropLightningCallback works with automatic optimization. With automatic_optimization=False call "
            "entprop.training_step(self.model, images, labels, backward=self.manual_backward) in your training_step; "
            "no callback is needed.",
        ),
        (
            type(strategy) not in (SingleDeviceStrategy, DDPStrategy) or static_graph,
            f"EntPropLightningCallback does not work with {type(strategy).__name__}, or with a static graph. Expected "
            "one device, or one process per device with strategy='ddp'; entprop.Trainer also trains under FSDP2.",
        ),
        (
            getattr(strategy, "_layer_sync", None) is not None,
            "Trainer(sync_batchnorm=True) replaces norm layers after they were wrapped. Write "
            "nn.SyncBatchNorm.convert_sync_batchnorm(model) where the LightningModule makes its model instead.",
        ),
        (
            getattr(module, "_compiler_ctx", None) is not None,
            "The LightningModule is compiled. Compile the model inside it instead: "
            "self.model = torch.compile(entprop.wrap(model)).",
        ),
        (
            averages,
            f"{', '.join(averages)} copies the LightningModule before it is wrapped, and would average parameters of "
            "different layers. Leave it out; entprop.Trainer averages weights (TrainerConfig(ema_decay=...)).",
        ),
        (
            is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True),
            "Expected training_step(batch, batch_idx), found one with dataloader_iter.",
        ),
    ]
    for present, message in problems:
        if present:
            raise UnsupportedModelError(message)
    if changed := [name for name in _HOOKS if name in vars(module)]:
        raise ConfigurationError(
            f"The module was given another {changed[0]} as an attribute, past which the callback cannot see. Override "
            "it in a subclass instead."
        )


def _find_classifier(module: Any, name: str | None) -> tuple[str, nn.Module]:
    """Return the name and the module that turns images into logits: an attribute, or ``"self"``.

    Raises:
        ConfigurationError: There is no such attribute, or none was named and none is obvious.
    """
    forward = is_overridden("forward", module)
    if name is None:
        name = "model" if isinstance(getattr(module, "model", None), nn.Module) else "self" if forward else None
    if name == "self" and forward:
        return name, module
    found = None if name in (None, "self") else dict(module.named_modules()).get(name)
    if found is None:
        children = ", ".join(repr(child) for child, _ in module.named_children()) or "none"
        wanted = {None: "no 'model' and no forward()", "self": "no forward()"}.get(name, f"no {name!r}")
        raise ConfigurationError(
            f"{type(module).__name__} has {wanted}; its parts are {children}. Write EntPropLightningCallback(..., "
            "model=) with the name of the part that turns images into logits, or 'self' for forward()."
        )
    return str(name), found


def _read_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """Return images and labels.

    Raises:
        ConfigurationError: The batch is not ``(images, labels)`` nor a dict with both and no other tensor.
    """
    if isinstance(batch, Mapping):
        images = [batch[name] for name in _IMAGES if name in batch]
        labels = [batch[name] for name in _LABELS if name in batch]
        others = [value for name, value in batch.items() if name not in _IMAGES + _LABELS]
        if len(images) == len(labels) == 1 and not any(isinstance(value, Tensor) and value.ndim for value in others):
            return images[0], labels[0]
        found = f"a dict with {', '.join(map(repr, batch))}"
    else:
        if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(item, Tensor) for item in batch):
            return batch[0], batch[1]
        found = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
    raise ConfigurationError(
        f"Expected batches (images, labels), or a dict with one of {', '.join(_IMAGES)} and one of "
        f"{', '.join(_LABELS)} as its tensors; found {found}. Images are mixed and selected, and nothing else in a "
        "batch can follow: leave it out in the dataset, or in the module's on_after_batch_transfer."
    )


def _rows_of(batch: Any, rows: int) -> Any:
    """Return the first rows of a batch that :func:`_read_batch` accepts."""
    if rows == len(_read_batch(batch)[0]):
        return batch
    if isinstance(batch, Mapping):
        return {k: v[:rows] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}
    return type(batch)([item[:rows] for item in batch])


# The copies in checkpoints, and between two fits ----------------------------------------------------------------------


def _separate(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Move the copies of ``module`` out of the ``state_dict`` of a checkpoint that is to be written."""
    state, keys = checkpoint["state_dict"], auxiliary_state_dict(module).keys()
    if copies := {key: value for key, value in state.items() if key in keys}:
        checkpoint["state_dict"] = {key: value for key, value in state.items() if key not in copies}
        checkpoint[AUXILIARY_KEY] = copies


def _join(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Put them back into the ``state_dict`` of a checkpoint that is to be loaded into ``module``, which is wrapped.

    Raises:
        CheckpointError: There are none, or those of a model that was wrapped differently.
    """
    state, keys = checkpoint["state_dict"], auxiliary_state_dict(module).keys()
    copies = checkpoint.get(AUXILIARY_KEY) or {key: value for key, value in state.items() if key in keys}
    if not copies:
        raise CheckpointError(
            "The checkpoint has no auxiliary copies: it was written without EntPropLightningCallback, so its optimizer "
            "does not know them. Start a new run from its weights: load_from_checkpoint(path), then fit() without "
            "ckpt_path."
        )
    load_auxiliary_state_dict(module, copies)  # for its checks
    checkpoint["state_dict"] = {**state, **copies}


def _add_waiting(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Add what waits for the next lagged step of each process."""
    waiting = next((state for part in module.modules() if (state := lagged_state(part))), None)
    if waiting is None:
        return
    waiting = {key: value.cpu() for key, value in waiting.items()}
    everyone: list[Any] = [waiting]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, waiting)
    checkpoint[_LAGGED_KEY] = everyone


class _Copies:
    """The copies of a module whose ``classifier`` is about to be unwrapped, and the norm layers that they belong to."""

    def __init__(self, module: nn.Module, classifier: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.auxiliary = {key: value.cpu().clone() for key, value in auxiliary_state_dict(module).items()}
        self.norms = weakref.WeakKeyDictionary(
            {
                norm: [tensor.cpu().clone() for tensor in _tensors(norm)]
                for norm in find_registry(classifier).norms.values()
            }
        )
        self.number = len(self.norms)

    def belong_to(self, module: nn.Module) -> bool:
        """Return whether ``module`` is the module they were taken from, with the norm layers it had."""
        if self.module() is not module or not self.number == len(self.norms) <= len(set(module.modules())):
            return False
        present = set(module.modules())
        return all(
            norm in present and all(map(torch.equal, (tensor.cpu() for tensor in _tensors(norm)), before))
            for norm, before in self.norms.items()
        )


def _tensors(norm: nn.Module) -> Iterator[Tensor]:
    return (tensor for tensor in (*norm._parameters.values(), *norm._buffers.values()) if tensor is not None)


# What stands around and in for a model in a step ----------------------------------------------------------------------


class _ModelInContext(nn.Module):
    """The classifier as the step calls it: in the precision plugin's context, which is autocast or nothing.

    It holds the model under the name that compiled modules use, so that everything that looks for the plain model
    inside a container finds it. ``kind`` puts logits into the form in which the model returned its last output.
    """

    def __init__(self, model: nn.Module, context: Callable[[], Any]) -> None:
        super().__init__()
        self._orig_mod = model
        self.context = context
        self.kind: Callable[[Tensor], Any] = lambda logits: logits

    def forward(self, images: Tensor) -> Any:
        """Return the model's output for ``images``."""
        with self.context():
            output = self._orig_mod(images)
        if isinstance(output, tuple):
            self.kind = lambda logits: (logits,)
        elif not isinstance(output, Tensor):
            self.kind = lambda logits: NamedLogits(logits=logits)
        return output


def _in_context(loss: Loss, context: Callable[[], Any]) -> Loss:
    """Return ``loss`` in a context, with the parameters that it declares."""

    @functools.wraps(loss.forward if isinstance(loss, nn.Module) else loss)
    def mean(*given: Any, **more: Any) -> Tensor:
        with context():
            return loss(*given, **more)

    return mean


class NamedLogits(dict[str, Tensor]):
    """Logits as models return them that name their outputs: ``.logits``, ``["logits"]`` or ``[0]``."""

    @property
    def logits(self) -> Tensor:
        """The logits ``(N, C)``."""
        return self["logits"]

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__("logits" if key == 0 else key)


class _LogitsOf(nn.Module):
    """Stands in for a model whose output on ``images`` is known, and counts its calls."""

    def __init__(self, model: Any, images: Tensor, output: Any) -> None:
        super().__init__()
        self.__dict__.update(stands_for=model, images=images, output=output)
        self.calls = 0

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Return the known output.

        Raises:
            UnsupportedModelError: These are other images, or the model is to compute a loss.
        """
        self.calls += 1
        given = args[0] if args else next(iter(inputs.values()), None)
        name = type(plain_model(self.__dict__["stands_for"])).__name__
        if inputs.get("labels") is not None:
            raise UnsupportedModelError(
                f"training_step lets {name} compute the loss, which cannot be done for mixed or selected images. "
                "Compute it of logits: torch.nn.functional.cross_entropy(self.model(images).logits, labels)."
            )
        images = self.__dict__["images"]
        same = isinstance(given, Tensor) and given.dtype == images.dtype
        if given is not images and not (same and torch.equal(given, images)):  # type: ignore[arg-type]
            raise UnsupportedModelError(
                f"training_step gives {name} other images than the batch holds. Change images where "
                "EntPropLightningCallback sees it: in the dataset, or in the module's on_after_batch_transfer."
            )
        return self.__dict__["output"]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stands_for"], name)


@contextmanager
def _stand_in(module: nn.Module, name: str, replacement: _LogitsOf) -> Iterator[None]:
    """Put ``replacement`` in the place of the part ``name`` of ``module``, or of its forward if that is ``"self"``."""
    path, _, last = name.rpartition(".")
    owner: dict[str, Any] = vars(module) if name == "self" else module.get_submodule(path)._modules
    key, new = ("forward", replacement.forward) if name == "self" else (last, replacement)
    before = {key: owner[key]} if key in owner else {}  # Lightning leaves a forward under DDP
    owner[key] = new
    try:
        yield
    finally:
        del owner[key]
        owner.update(before)


class _AlreadyDone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.number = len(parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        return tuple(None for _ in range(1 + ctx.number))


def _already_done(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Return a loss whose backward reaches ``parameters`` and adds nothing: their gradients are there already.

    Reaching them is what makes DDP reduce the gradients that they have.
    """
    anything = loss.new_zeros(()).requires_grad_()  # something has to be differentiable, with one process too
    result: Tensor = _AlreadyDone.apply(loss, anything, *parameters)
    return result
