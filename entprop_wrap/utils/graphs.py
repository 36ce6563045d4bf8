"""The graph that autograd keeps of a pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["leaves_of"]


def leaves_of(output: Any, inputs: Any = ()) -> set[int]:
    """Return the ids of the leaves in the graph that a pass has put between ``inputs`` and ``output``."""
    seen = {tensor.grad_fn for tensor in tree_leaves(inputs) if isinstance(tensor, Tensor)}
    found: set[int] = set()
    nodes = [tensor.grad_fn for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if (leaf := getattr(node, "variable", None)) is not None:
                found.add(id(leaf))
            nodes.extend(following for following, _ in node.next_functions)
    return found
