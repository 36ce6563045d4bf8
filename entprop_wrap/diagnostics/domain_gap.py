"""``domain_gap``: how far the auxiliary norms have moved away from the main ones, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entprop_wrap.robustness.result import escaped, markdown_table
from entprop_wrap.utils.modules import check_module
from entprop_wrap.utils.statistics import Result
from entprop_wrap.wrapping.registry import find_registry
from entprop_wrap.wrapping.switched_norm import COPY_PREFIX


@dataclass(frozen=True)
class LayerGap:
    """The distance of one auxiliary copy from its norm layer ``layer`` of class ``kind``.

    Attributes:
        parameters: By parameter ("weight", "bias", ...): ``|aux - main|`` over the mean of ``|aux|`` and ``|main|``, in
            [0, 2]; 0 for equal ones.
        statistics: Symmetrised Kullback-Leibler divergence of the running statistics, read as normal distributions:
            ``(KL(aux, main) + KL(main, aux)) / 2`` in nats, mean over channels. None without running statistics.
    """

    layer: str
    kind: str
    auxiliary: str
    parameters: dict[str, float]
    statistics: float | None


@dataclass(frozen=True)
class DomainGap(Result):
    """Distances between main and auxiliary norms: one for each norm layer and auxiliary, in the order of the model."""

    layers: tuple[LayerGap, ...]

    def rows(self) -> list[list[str]]:
        """Return the cells of a table by layer, the head first."""
        names = list(dict.fromkeys(name for layer in self.layers for name in layer.parameters))
        rows = [["layer", "kind", "auxiliary", *names, "statistics, nats"]]
        for gap in self.layers:
            numbers = [gap.parameters.get(name) for name in names] + [gap.statistics]
            shown = ["" if number is None else f"{number:.3g}" for number in numbers]
            rows.append([gap.layer, gap.kind, gap.auxiliary, *shown])
        return rows

    def to_markdown(self) -> str:
        """Return a table by layer."""
        return markdown_table([[*map(escaped, row)] for row in self.rows()])


def domain_gap(model: nn.Module) -> DomainGap:
    """Measure how far each auxiliary copy is from its norm layer; all distances are 0 right after ``wrap``.

    Args:
        model: A wrapped model in any mode, or its container; it is only read. Sharded parameters are not gathered.

    Raises:
        NotWrappedError: The model has no auxiliary copies.
    """
    check_module("The model", model)
    registry = find_registry(model)
    layers = []
    for name, norm in registry.norms.items():
        for auxiliary in registry.auxiliaries:
            copy = norm.get_submodule(COPY_PREFIX + auxiliary)
            parameters = {
                key: _relative(parameter.detach().cpu().double(), norm.get_parameter(key).detach().cpu().double())
                for key, parameter in copy._parameters.items()  # others are shared
                if parameter is not None
            }
            layers.append(LayerGap(name, type(norm).__name__, auxiliary, parameters, _divergence(copy, norm)))
    return DomainGap(tuple(layers))


def _relative(copy: Tensor, main: Tensor) -> float:
    size = (torch.linalg.vector_norm(copy) + torch.linalg.vector_norm(main)) / 2
    return float(torch.linalg.vector_norm(copy - main) / size) if size else 0.0


def _divergence(copy: nn.Module, norm: nn.Module) -> float | None:
    if not all(isinstance(copy._buffers.get(name), Tensor) for name in ("running_mean", "running_var")):
        return None
    mean, other_mean = (one.get_buffer("running_mean").cpu().double() for one in (norm, copy))
    var, other_var = (one.get_buffer("running_var").cpu().double() + getattr(norm, "eps", 0.0) for one in (norm, copy))
    # The logarithms of both directions cancel.
    square = (mean - other_mean).square()
    both = (var + square) / other_var + (other_var + square) / var - 2
    return float(both.mean() / 4)
