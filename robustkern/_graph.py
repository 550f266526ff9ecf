"""The graph that autograd has built."""

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node


def graph_nodes(tensor: Tensor) -> Iterator[Node]:
    """Yields every node that a backward pass from `tensor` can reach, once."""
    seen = set()
    stack = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(next_node for next_node, _ in node.next_functions)
