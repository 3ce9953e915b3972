"""Keeps DeepSpeed and PyTorch from importing and probing, at the start of every run, what no run here needs.

That is half of the seconds until the first step. This file replaces internals of the pinned version of DeepSpeed.
"""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime import compiler
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mepa_ds.models.feed_forward import gelu_with_slope
from mepa_ds.models.moe.expert_loop import expert_loop


def leave_out_needless_work() -> None:
    """To be called before DeepSpeed is used. May be called again."""
    # DeepSpeed would call compilers to see which of its operators it could build, on a CPU build one of them (33 s, and
    # a crash without g++), and use none.
    deepspeed.ops.__compatible_ops__ = {}
    # It imports its Muon wherever it asks for the optimizer's type, and the import of that compiles three functions:
    # all of torch.compile comes with it.
    with mock.patch.object(compiler, "compile", return_value=compiler.dummy_decorator):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    for operator in (expert_loop, gelu_with_slope):  # as for the methods of AdamW below
        for device, kernel in operator._backend_fns.items():
            operator._backend_fns[device] = getattr(kernel, "__wrapped__", kernel)


class AdamW(torch.optim.AdamW):
    """PyTorch's own, without what is wrapped around these methods: that imports torch.compile, and is for it alone."""

    add_param_group: Any = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    zero_grad: Any = torch.optim.Optimizer.zero_grad.__wrapped__  # type: ignore[attr-defined]
    step: Any = torch.no_grad()(torch.optim.AdamW.step.__wrapped__)  # type: ignore[attr-defined]


class NothingDrawn(TorchFunctionMode):
    """Within it, modules are made without drawing their weights. PyTorch imports torch._dynamo to draw on "meta"."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        if getattr(function, "__module__", "") == torch.nn.init.__name__:
            weights: Tensor = keywords["tensor"] if "tensor" in keywords else arguments[0]
            return weights
        return function(*arguments, **keywords)


def materialise(model: nn.Module, device: torch.device) -> None:
    """Gives the parameters and buffers of a model on "meta" memory on `device`, in place, and no values.

    As `Module.to_empty` does, which imports SymPy for it.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module.register_parameter(name, nn.Parameter(empty, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
