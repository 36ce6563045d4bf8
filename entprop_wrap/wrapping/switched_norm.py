"""The mechanism of the switch: what happens inside one norm layer.

A norm's class becomes a dynamic subclass of its own class. In the main domain the subclass runs the original forward on
the norm itself. In an auxiliary domain it runs the *same* original forward on a view: an unregistered object of the
base class that reads its tensors from the copy and everything else (``training``, ``eps``, fused activations, ...) from
the norm. Neither object is ever mutated by switching, so threads, checkpointing and ``torch.compile`` stay safe.

Nothing in here is public; :mod:`entprop_wrap.wrapping` is the door.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from entprop_wrap.errors import UnsupportedModelError
from entprop_wrap.wrapping.active_domain import UNRECORDED, ActiveDomain, Rows

#: The copies live in a child of each norm named ``entprop_<auxiliary>``. Weight decay is decided by parameter name in
#: many trainers, so the name contains neither "norm" nor "bias".
COPY_PREFIX = "entprop_"

#: Which tensors of a norm an auxiliary domain has of its own: parameters and buffers, parameters, or buffers.
Copies = Literal["all", "affine", "statistics"]


class AuxiliaryNorm(nn.Module):
    """The parameters and buffers of one auxiliary copy of a norm layer. It holds tensors and computes nothing.

    Its class derives from the norm's own, so that whatever decides by class (weight decay, freezing, initialisation)
    decides alike for both. What is not a tensor of its own it reads from the norm.
    """

    _entprop_base: type[nn.Module]
    _entprop_norm: nn.Module
    _entprop_tensors: frozenset[str]

    # An extra state is the norm's; in a copy it would be one more key of the state dict.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a copy is run through its norm, by ``entprop.auxiliary``."""
        raise UnsupportedModelError("An auxiliary copy holds tensors only; run the model inside entprop.auxiliary().")

    def extra_repr(self) -> str:
        """Return nothing: a norm may describe itself by its ``__dict__``."""
        return ""

    def reset_running_stats(self) -> None:
        """Do nothing: ``update_bn`` resets what the passes after it fill again, and these run in the main domain."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield its own parameters for ``recurse=False``, else nothing: those of the norm include them.

        ``for module in model.modules(): if isinstance(module, BatchNorm2d): parameters += module.parameters()`` would
        find them twice. The parameters of a whole model do not come through here.
        """
        return iter(()) if recurse else super().named_parameters(prefix, False, remove_duplicate)

    def children(self) -> Iterator[nn.Module]:
        """Yield an empty module if the norm has children of its own, such as a fused activation, else nothing.

        torchvision's split_normalization_params takes modules with children for blocks; a copy is what its norm is.
        """
        if next(self._entprop_norm.children(), None):
            yield nn.Identity()

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freeze or thaw its own parameters."""
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(requires_grad)
        return self

    def __bool__(self) -> bool:
        # torchvision's split_normalization_params asks `next(norm.children(), None)` whether a norm is a leaf.
        return False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # FSDP takes tensors out, and looks whether they are gone before it puts others in.
            if "_entprop_norm" not in self.__dict__ or name in self._entprop_tensors:
                raise
            return getattr(self._entprop_norm, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return _rebuild, (copy_class, self._entprop_base), *state

    def keep(self) -> None:
        """Keep the tensors as they are when a checkpoint of the plain model is loaded, until they are trained."""
        self.__dict__["_entprop_kept"] = self._versions()

    def is_kept(self) -> bool:
        """Return whether :meth:`keep` was called, and nothing has moved the tensors since."""
        kept = self.__dict__.get("_entprop_kept")
        return kept is not None and kept == self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        tensors = (*self._parameters.values(), *self._buffers.values())
        return [(id(tensor), tensor._version) for tensor in tensors if tensor is not None]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.is_kept() and not any(key.startswith(prefix) for key in state_dict):
            return
        # Not the norm's own: it has brought the dictionary up to date already.
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)


class View(nn.Module):
    """What an auxiliary forward sees as ``self``: the copy's tensors, and everything else of the norm."""

    _entprop_base: type[nn.Module]

    # No __init__: nn.Module's own would give the view tensors, hooks and flags of its own.

    def __getattr__(self, name: str) -> Any:
        links = self.__dict__
        if "_entprop_norm" not in links:
            raise AttributeError(name)
        if name in links["_entprop_parameters"]:
            return getattr(links["_entprop_parameters_of"], name)
        if name in links["_entprop_buffers"]:
            buffer = getattr(links["_entprop_buffers_of"], name)
            # A throw-away clone takes what would be recorded. Batch norms record nothing to begin with: see below.
            return buffer if links["_entprop_record"] or buffer is None else buffer.clone()
        return getattr(links["_entprop_norm"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        links = self.__dict__
        if name not in links["_entprop_parameters"] and name not in links["_entprop_buffers"]:
            links[name] = value
        elif links["_entprop_record"]:
            kind = "parameters" if name in links["_entprop_parameters"] else "buffers"
            setattr(links[f"_entprop_{kind}_of"], name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (view_class, self._entprop_base), self.__dict__


class SwitchedNorm(nn.Module):
    """Mixin of every switched norm; the class attribute ``_entprop_base`` is the class the norm had before."""

    _entprop_base: type[nn.Module]
    _entprop_switch: ActiveDomain
    _entprop_views: dict[str, View]

    @property
    def _entprop_names(self) -> frozenset[str]:
        """The names of the parameters that the norm had when it was wrapped."""
        names: frozenset[str] = self._entprop_views[UNRECORDED].__dict__["_entprop_parameters"]
        return names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward on this norm, or on the view of the domain that is switched on."""
        switch = self._entprop_switch
        if torch.compiler.is_compiling():
            key = getattr(getattr(switch.local, "state", None), "key", None)  # a plain read, which dynamo guards on
        else:
            key = switch.resolve()
            if switch.ran is not None:
                switch.ran.add(id(self))
        if key is None:
            return super().forward(*args, **kwargs)
        if isinstance(key, Rows):
            return self._forward_rows(key, *args, **kwargs)
        return self._entprop_base.forward(self._entprop_views[key], *args, **kwargs)

    def _forward_rows(self, key: Rows, batch: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Dimension 0 may hold several entries for each image (windows); prove_rows() has seen that these lie together.
        rows = len(batch)
        if rows % key.total:
            raise UnsupportedModelError(
                f"A norm layer was given {rows} rows for {key.total} images, so that no rows are those of one image. "
                "Write lagged=False."
            )
        split = rows // key.total * key.main
        # One node in the graph, whose backward is one cat.
        main, auxiliary = batch.split([split, rows - split])  # type: ignore[no-untyped-call]
        view = self._entprop_views[key.auxiliary]
        return torch.cat(
            [super().forward(main, *args, **kwargs), self._entprop_base.forward(view, auxiliary, *args, **kwargs)]
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return _rebuild, (switched_class, self._entprop_base), *state

    def _replicate_for_data_parallel(self) -> Any:
        raise UnsupportedModelError(
            "nn.DataParallel replicates a model without its auxiliary copies. Expected one process per GPU: start the "
            "script with `accelerate launch` or torchrun (DistributedDataParallel), or show it one GPU only."
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # A checkpoint of the plain model knows no copies: they start again as what they are copies of. torch hands the
        # children what this dictionary, its own shallow copy, holds once we return. Only now has it been brought up to
        # date by the norm: checkpoints before torch 0.4.1 have no num_batches_tracked.
        for name, copy in self._modules.items():
            if not isinstance(copy, AuxiliaryNorm) or copy.is_kept():
                continue
            if any(key.startswith(f"{prefix}{name}.") for key in state_dict):
                continue
            for tensor in copy.state_dict():
                if (value := state_dict.get(prefix + tensor)) is not None:
                    state_dict[f"{prefix}{name}.{tensor}"] = value.clone()


def copy_of(norm: nn.Module, cloned: dict[int, nn.Parameter], copies: Copies = "all") -> AuxiliaryNorm:
    """Return a copy of the norm's own tensors: equal values, same dtype, device, ``requires_grad``, persistence.

    ``cloned`` remembers the parameters cloned for one auxiliary, so that what is tied stays tied. What ``copies``
    leaves out is shared with the norm.
    """
    copy: AuxiliaryNorm = object.__new__(copy_class(type(norm)))  # type: ignore[arg-type]
    nn.Module.__init__(copy)
    for name, parameter in norm._parameters.items() if copies != "statistics" else ():
        if parameter is not None and id(parameter) not in cloned:
            cloned[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        copy.register_parameter(name, None if parameter is None else cloned[id(parameter)])
    for name, buffer in norm._buffers.items() if copies != "affine" else ():
        persistent = name not in norm._non_persistent_buffers_set
        copy.register_buffer(name, buffer if buffer is None else buffer.detach().clone(), persistent=persistent)
    copy.__dict__.update(_entprop_norm=norm, _entprop_tensors=frozenset((*copy._parameters, *copy._buffers)))
    copy.train(norm.training)
    return copy


def install(norm: nn.Module, copies: dict[str, AuxiliaryNorm], switch: ActiveDomain) -> None:
    """Turn ``norm`` into a switched norm with these copies, in place."""
    base = type(norm)
    views: dict[str, View] = {}
    for name, copy in copies.items():
        norm.add_module(COPY_PREFIX + name, copy)
        views[name] = _view(norm, copy, record=True)
        views[name + UNRECORDED] = _view(norm, copy, record=False)
    views[UNRECORDED] = _view(norm, norm, record=False)
    norm.__class__ = switched_class(base)  # type: ignore[arg-type]
    norm.__dict__["_entprop_switch"] = switch
    norm.__dict__["_entprop_views"] = views


def remove(norm: SwitchedNorm) -> None:
    """Undo :func:`install`, in place, but for the copies, which :func:`drop_copies` takes out."""
    del norm.__dict__["_entprop_switch"], norm.__dict__["_entprop_views"]
    norm.__class__ = norm._entprop_base  # type: ignore[assignment]


def drop_copies(module: nn.Module) -> None:
    """Take the copies out of a norm, or out of what a conversion has put in a norm's place."""
    for name in [name for name, child in module._modules.items() if isinstance(child, AuxiliaryNorm)]:
        del module._modules[name]


def block_fast_path(module: nn.Module) -> None:
    """Keep an encoder layer of torch off the path that reads the weights of its norms and does not run them."""
    if isinstance(module, nn.TransformerEncoderLayer):
        module.register_forward_pre_hook(_no_fast_path)


def free_fast_path(module: nn.Module) -> None:
    """Undo :func:`block_fast_path`."""
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _no_fast_path]:
        del module._forward_pre_hooks[key]


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """Do nothing: torch leaves its fast path where there is a hook."""


def _view(norm: nn.Module, copy: nn.Module, *, record: bool) -> View:
    view: View = object.__new__(view_class(type(norm)))  # type: ignore[arg-type]
    own_buffers = norm._buffers.keys() == copy._buffers.keys()
    # Functions that the norm has instead of its class's: these hide the norm's own from __getattr__.
    view.__dict__.update((name, held) for name, held in vars(norm).items() if callable(getattr(type(norm), name, None)))
    view.__dict__.update(
        _entprop_norm=norm,
        _entprop_parameters=frozenset(norm._parameters),
        _entprop_parameters_of=copy if norm._parameters.keys() == copy._parameters.keys() else norm,
        _entprop_buffers=frozenset(norm._buffers),
        _entprop_buffers_of=copy if own_buffers else norm,
        _entprop_record=record and own_buffers,  # shared statistics are the main domain's to record
    )
    return view


@functools.cache
def switched_class(base: type[nn.Module]) -> type[SwitchedNorm]:
    """Return the switched subclass of ``base``, by the same name, in the same module (fx and repr go by these)."""
    return type(base.__name__, (SwitchedNorm, base), {**_identity(base), "_entprop_base": base})


@functools.cache
def copy_class(base: type[nn.Module]) -> type[AuxiliaryNorm]:
    """Return the class of copies of ``base``."""
    return type(base.__name__, (AuxiliaryNorm, base), {**_identity(base), "_entprop_base": base})


@functools.cache
def view_class(base: type[nn.Module]) -> type[View]:
    """Return the class of views of ``base``."""
    namespace: dict[str, Any] = {**_identity(base), "_entprop_base": base}
    for cls in base.__mro__[: base.__mro__.index(nn.Module)]:
        for name, value in vars(cls).items():
            # A default kept on the class (eps = 1e-5) would hide the norm's own value from __getattr__.
            if not (name.startswith("__") or callable(value) or hasattr(value, "__get__")):
                namespace.setdefault(name, property(_reader(name)))
    if issubclass(base, _BatchNorm):
        namespace["track_running_stats"] = property(_tracks)
    return type(base.__name__, (View, base), namespace)


def _reader(name: str) -> Callable[[View], Any]:
    def read(view: View) -> Any:
        return getattr(view.__dict__["_entprop_norm"], name)

    return read


def _tracks(view: View) -> bool:
    # In training mode a batch norm that tracks nothing normalises with the batch and touches no buffer: exact and free.
    norm: Any = view.__dict__["_entprop_norm"]
    return bool(norm.track_running_stats and (view.__dict__["_entprop_record"] or not norm.training))


def _identity(base: type[nn.Module]) -> dict[str, Any]:
    return {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}


def _rebuild(make_class: Any, base: type[nn.Module]) -> nn.Module:
    rebuilt: nn.Module = object.__new__(make_class(base))
    return rebuilt
