"""The graph that autograd keeps of a pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def leaves_of(output: Any, inputs: Any = ()) -> set[int]:
    """Return the ids of the leaves in the graph that a pass has put between ``inputs`` and ``output``."""
    return {id(leaf) for node in _nodes(output, inputs) if (leaf := getattr(node, "variable", None)) is not None}


def uses_of(tensor: Tensor, output: Any) -> int:
    """Return how many operations between ``tensor``, a leaf or not, and ``output`` it goes straight into."""

    def is_it(node: Any) -> bool:
        return node is not None and (node is tensor.grad_fn or getattr(node, "variable", None) is tensor)

    return sum(is_it(following) for node in _nodes(output, tensor) for following, _ in node.next_functions)


def _nodes(output: Any, inputs: Any) -> list[Any]:
    """Return the nodes of the graph from ``output`` back to ``inputs``."""
    seen = {tensor.grad_fn for tensor in tree_leaves(inputs) if isinstance(tensor, Tensor)}
    found = []
    ahead = [tensor.grad_fn for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.append(node)
            ahead.extend(following for following, _ in node.next_functions)
    return found
