"""A backward pass on fake CUDA tensors (benchmarks/fake_device.py), without the device."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter as Multiset
from typing import Any

import torch
from torch import Tensor


def backward(loss: Tensor) -> None:
    """`loss.backward()`, which PyTorch's engine refuses on a machine without the device: it asks it for its streams.

    The same graph is walked here, node by node in the engine's order. Gradients are summed where paths meet, have the
    shape and type of what they are gradients of, and are added to the parameters' `grad`. A gradient on another device
    raises, as in the engine.
    """
    assert loss.grad_fn is not None
    root: Any = loss.grad_fn
    waiting = _num_edges_into(root)
    gradients: dict[Any, list[Tensor | None]] = {root: [torch.ones_like(loss)]}
    turn = itertools.count()  # nodes of one number cannot be compared themselves
    queue = [(-root._sequence_nr(), next(turn), root)]
    with torch.no_grad():
        while queue:
            _, _, node = heapq.heappop(queue)
            of_outputs = gradients.pop(node, None)
            results = _applied(node, of_outputs) if of_outputs is not None else ()
            for number, (following, place) in enumerate(node.next_functions):
                if following is None:
                    continue
                gradient = results[number] if number < len(results) else None
                if gradient is not None:
                    slots = gradients.setdefault(following, [None] * len(following._input_metadata))
                    gradient = _fitting(gradient, following._input_metadata[place])
                    before = slots[place]
                    slots[place] = gradient if before is None else before + gradient
                waiting[following] -= 1
                if waiting[following] == 0:
                    heapq.heappush(queue, (-following._sequence_nr(), next(turn), following))


def _num_edges_into(root: Any) -> Multiset[Any]:
    edges: Multiset[Any] = Multiset()
    seen, stack = {root}, [root]
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                edges[following] += 1
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
    return edges


def _applied(node: Any, of_outputs: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of a node's inputs."""
    if hasattr(node, "variable"):  # a parameter
        (gradient,) = of_outputs
        if gradient is not None:
            node.variable.grad = gradient if node.variable.grad is None else node.variable.grad + gradient
        return ()
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # one of Python's, which is given no None
        facts = node._input_metadata  # type: ignore[attr-defined]
        full = [
            torch.zeros(fact.shape, dtype=fact.dtype, device=fact.device) if gradient is None else gradient
            for gradient, fact in zip(of_outputs, facts, strict=True)
        ]
        results = node.apply(*full)
    else:
        results = node(*of_outputs)
    return results if isinstance(results, tuple) else (results,)


def _fitting(gradient: Tensor, fact: Any) -> Tensor:
    """The gradient in the shape and type of what it is the gradient of."""
    if gradient.device != fact.device:
        raise RuntimeError(f"a gradient is on {gradient.device}, and what it is the gradient of on {fact.device}")
    if gradient.shape != fact.shape:
        gradient = gradient.sum_to_size(fact.shape)
    return gradient.to(fact.dtype)
