"""How much memory a forward and backward pass needs, found by running it with fake tensors: they have no data.

The model's own code runs, with all its options (activation checkpointing, precision), so nothing here repeats that
code. Only choices that depend on data are replaced: experts get even loads.

Shapes: T tokens, C width, R routed rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.models.moe.dispatch import SharedExpert, TokenPermutation
from mepa_ds.models.moe.experts import Experts
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.models.moe.routing import Routing
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.objective import Losses, ModelInputs, PretrainingObjective


@dataclass(frozen=True)
class Traced:
    """Bytes of one micro-batch on one rank. Gradients of parameters are not among them."""

    kept: int
    """Activations that the forward pass keeps for the backward pass."""
    intermediate: int
    """All other memory at the peak of both passes, except `exchanged`."""
    exchanged: int
    """Tokens that have come from other ranks, and gradients for them: buffers of all-to-alls that live at the peak."""
    num_elements: dict[str, int]
    """Elements of the parameters that this rank holds: routed experts, the transformer's others, the projector's."""


class LiveBytes(TorchDispatchMode):
    """Sums the storages that operations have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.exchanged = self.exchanged_at_peak = 0
        """The part of `now` and of `peak` that was made within `exchanging`."""
        self._known: set[int] = set()
        self._exchanging = False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        self.grow(0)
        return result

    def grow(self, size: int) -> None:
        """Adds bytes that stay allocated from now on, whatever holds them."""
        self.now += size
        if self.now > self.peak:
            self.peak, self.exchanged_at_peak = self.now, self.exchanged

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        self._exchanging = True
        yield
        self._exchanging = False

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Does not count storages that existed before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            exchanged = size if self._exchanging else 0
            self.exchanged += exchanged
            weakref.finalize(storage, self._remove, key, size, exchanged)

    def _remove(self, key: int, size: int, exchanged: int) -> None:
        self._known.discard(key)
        self.now -= size
        self.exchanged -= exchanged


class _Exchange(torch.autograd.Function):
    """Takes the memory of an all-to-all: a new tensor of the same size, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x_RC: Tensor, live: LiveBytes) -> Tensor:
        ctx.live = live
        with live.exchanging():
            return torch.empty_like(x_RC)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        with ctx.live.exchanging():
            return torch.empty_like(gradient), None


class _EvenCounts:
    """The rows of each expert, in the form in which the CPU's loop reads them."""

    def __init__(self, rows: int, num_experts: int):
        self._counts = [rows // num_experts + (expert < rows % num_experts) for expert in range(num_experts)]

    def tolist(self) -> list[int]:
        return self._counts


class _EvenDispatcher:
    """Gives every expert the same number of rows: without data there are no choices."""

    def __init__(self, num_experts: int, ep_size: int, live: LiveBytes):
        self._num_experts, self._ep_size, self._live = num_experts, ep_size, live

    def __call__(
        self, x_TC: Tensor, routing: Routing, experts: Experts, shared_expert: SharedExpert | None = None
    ) -> Tensor:
        permutation = TokenPermutation(x_TC, routing, self._num_experts)
        beside_TC = None if shared_expert is None else shared_expert(x_TC)
        x_RC = permutation.permute()
        order_R = torch.empty(len(x_RC), dtype=torch.int64)
        if self._ep_size > 1:
            x_RC = _Exchange.apply(x_RC, self._live).index_select(0, order_R)
        y_RC = experts(x_RC, _EvenCounts(len(x_RC), experts.num_experts))  # type: ignore[arg-type]
        if self._ep_size > 1:
            y_RC = _Exchange.apply(y_RC.index_select(0, order_R), self._live)
        y_TC = permutation.unpermute(y_RC)
        return y_TC if beside_TC is None else y_TC + beside_TC


def trace_micro_batch(
    config: PretrainConfig,
    batch: int,
    teacher_width: int | None,
    teacher_patches: int,
    on_gradient: Callable[[int], int],
    observer: TorchDispatchMode | None = None,
) -> Traced:
    """Traces a micro-batch of `batch` images on one rank. A GPU's kernels keep the same as a CPU's, to a few per cent.

    `on_gradient` is called when the gradient of a parameter of so many elements is complete and has gone into the
    engine's buffers; it returns the bytes that these have grown by. `observer` sees all operations of both passes.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.parallel.precision]
    live = LiveBytes()
    with FakeTensorMode():
        objective = _build(config, teacher_width, live)
        materialise(objective, dtype)
        live.ignore(parameter.detach() for parameter in objective.parameters())
        for parameter in objective.parameters():
            parameter.register_post_accumulate_grad_hook(_handing_over(live, on_gradient))
        inputs = _inputs(config, batch, teacher_width, teacher_patches)
        with observer or nullcontext(), live:
            losses: Losses = objective(inputs)
            kept = live.now - live.exchanged
            losses.total.backward()
    counts = {"routed experts": 0, "transformer": 0, "projector": 0}
    for name, parameter in objective.named_parameters():
        part = "routed experts" if ".experts." in name else name.split(".")[0]
        counts[part] += parameter.numel()
    others = live.peak - live.exchanged_at_peak
    kept = min(kept, others)  # some activations are freed by the peak if a large part is exchanged
    return Traced(kept, others - kept, live.exchanged_at_peak, counts)


def _handing_over(live: LiveBytes, on_gradient: Callable[[int], int]) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        live.grow(on_gradient(parameter.numel()))
        parameter.grad = None

    return hook


def _build(config: PretrainConfig, teacher_width: int | None, live: LiveBytes) -> PretrainingObjective:
    """The rank's share of the objective, dropless and with even loads."""
    model = config.model
    if model.moe is not None:
        router = "stmoe" if model.moe.router == "expert_choice" else model.moe.router
        model = model.model_copy(
            update={"moe": model.moe.model_copy(update={"capacity_factor": None, "router": router})}
        )
    with torch.device("meta"):  # draws no initial values
        transformer = NextScaleTransformer(model)
        objective = PretrainingObjective(transformer, config.objective, teacher_width)
        for layer in objective.modules():
            if isinstance(layer, MoEFeedForward):
                width, hidden = layer.experts.fc2_weight.shape[1:]
                layer.experts = Experts(layer.num_experts // config.parallel.ep_size, width, hidden)
                layer.dispatcher = _EvenDispatcher(layer.num_experts, config.parallel.ep_size, live)
    transformer.check_labels = lambda labels_B: None  # type: ignore[method-assign]  # there are no values to check
    transformer.recompute = config.parallel.activation_checkpointing
    return objective


def materialise(model: nn.Module, dtype: torch.dtype) -> None:
    """From the meta device to the current one (both fake, which is why Module.to_empty does not work)."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _inputs(config: PretrainConfig, batch: int, teacher_width: int | None, teacher_patches: int) -> ModelInputs:
    model, schedule = config.model, config.model.schedule
    aligned = config.objective.alignment is not None and teacher_width is not None
    return ModelInputs(
        labels_B=torch.zeros(batch, dtype=torch.int64),
        inputs_BLZ=torch.zeros(batch, schedule.num_tokens - schedule.lengths[0], model.code_width),
        tokens_BL=torch.zeros(batch, schedule.num_tokens, dtype=torch.int64),
        features_BNP=torch.zeros(batch, teacher_patches, teacher_width or 0) if aligned else None,
        branch_scale_D2B=torch.ones(model.depth, 2, batch) if model.drop_path_rate else None,
    )
