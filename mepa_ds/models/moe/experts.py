"""The routed experts' weights and their grouped matrix products.

Shapes: R rows (one for each routed (token, choice) pair), E experts held here, C width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from mepa_ds.models.feed_forward import fused_gelu_types

_FUSED_ROWS = 1024  # of an expert; see _fuses_gelu


class Experts(nn.Module):
    """E two-layer GELU FFNs, stacked so that every expert has a gradient on every step (ZeRO-2 relies on it)."""

    def __init__(self, num_experts: int, width: int, hidden: int):
        super().__init__()
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.fc1_bias = nn.Parameter(torch.empty(num_experts, hidden))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.fc2_bias = nn.Parameter(torch.empty(num_experts, width))

    @property
    def num_experts(self) -> int:
        return self.fc1_weight.shape[0]

    def forward(self, x_RC: Tensor, counts_E: Tensor, counts: list[int] | None = None) -> Tensor:
        """Rows sorted by expert -> (R, C); `counts_E` says how many rows each expert has (0 is fine).

        `counts` are the same numbers on the host, where a dispatcher has them already: it saves the loop a host sync.
        """
        tensors = [x_RC, self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias]
        if torch.is_autocast_enabled(x_RC.device.type):
            tensors = [tensor.to(torch.get_autocast_dtype(x_RC.device.type)) for tensor in tensors]
        if has_grouped_kernel(tensors):
            return grouped_experts(tensors, counts_E)
        return looped_experts(tensors, counts_E.tolist() if counts is None else counts)


def has_grouped_kernel(tensors: Sequence[Tensor]) -> bool:
    """Whether grouped_mm is one kernel here: bf16, on compute capability 9 or 10, rows of whole 16 bytes.

    Elsewhere torch's own fallback copies the offsets to the host at every call, and then loops as we do.
    """
    x_RC, w1_EFC, *_ = tensors
    if not x_RC.is_cuda or x_RC.dtype != torch.bfloat16 or any(size % 8 for size in w1_EFC.shape[1:]):
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(x_RC.device)[0] in (9, 10)


def grouped_experts(tensors: Sequence[Tensor], counts_E: Tensor) -> Tensor:
    """Grouped GEMMs over all experts. Takes rows, weights and biases; free of host syncs where the kernel is native."""
    x_RC, w1_EFC, b1_EF, w2_ECF, b2_EC = tensors
    if x_RC.is_cuda and torch.cuda.get_device_capability(x_RC.device)[0] == 10:
        w1_EFC, w2_ECF = NoRowsNoGradient.apply(w1_EFC, counts_E), NoRowsNoGradient.apply(w2_ECF, counts_E)
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    numbers_E = torch.arange(len(counts_E), device=x_RC.device)
    expert_R = torch.repeat_interleave(numbers_E, counts_E, output_size=x_RC.shape[0])
    hidden_RF = _AddBias.apply(F.grouped_mm(x_RC, w1_EFC.transpose(1, 2), offs=offsets_E), b1_EF, expert_R)
    hidden_RF = F.gelu(hidden_RF, approximate="tanh")
    return _AddBias.apply(F.grouped_mm(hidden_RF, w2_ECF.transpose(1, 2), offs=offsets_E), b2_EC, expert_R)


def looped_experts(tensors: Sequence[Tensor], counts: list[int]) -> Tensor:
    """A GEMM pair for each expert: fastest on a CPU, and wherever grouped GEMMs are not native."""
    return _ExpertLoop.apply(*tensors, counts)


class NoRowsNoGradient(torch.autograd.Function):
    """The weights as they are; the gradient of an expert without rows is 0.

    On Blackwell grouped_mm may leave there what its accumulator held: pytorch/pytorch#172439.
    """

    @staticmethod
    def forward(ctx: Any, weight_EFC: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(counts_E)
        return weight_EFC.view_as(weight_EFC)

    @staticmethod
    def backward(ctx: Any, grad_EFC: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (counts_E,) = ctx.saved_tensors
        return grad_EFC.masked_fill((counts_E == 0)[:, None, None], 0), None


class _AddBias(torch.autograd.Function):
    """y + b[expert]; the bias's gradient is one product with one-hot rows, not an add of R rows onto E."""

    @staticmethod
    def forward(ctx: Any, y_RF: Tensor, bias_EF: Tensor, expert_R: Tensor) -> Tensor:
        ctx.save_for_backward(expert_R)
        ctx.num_experts = len(bias_EF)
        return y_RF + bias_EF.index_select(0, expert_R)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (expert_R,) = ctx.saved_tensors
        expert_RE = F.one_hot(expert_R, ctx.num_experts).to(grad_RF.dtype)
        return grad_RF, expert_RE.T @ grad_RF, None


@torch.library.custom_op(
    "mepa_ds::expert_loop",
    mutates_args=(),
    schema="(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, int[] counts) -> (Tensor[], Tensor[], Tensor)",
)
def expert_loop(
    x_RC: Tensor, w1_EFC: Tensor, b1_EF: Tensor, w2_ECF: Tensor, b2_EC: Tensor, counts: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Before and after the GELU, expert by expert, and the output. One operator, so that recomputation can keep what it
    gave. Rows are padded as `_padded_slices` says, so the first two have some rows more than x.
    """
    multiple, fuses = _row_multiple(x_RC, len(counts)), _fuses_gelu(x_RC, len(counts))
    y_RC = x_RC.new_empty(len(x_RC) + multiple - 1, x_RC.shape[1])
    befores, hiddens = list[Tensor](), list[Tensor]()
    # One call for all experts' views: with many experts, an indexing each costs as much as it gives.
    w1, b1, w2, b2 = w1_EFC.unbind(), b1_EF.unbind(), w2_ECF.mT.unbind(), b2_EC.unbind()
    for e, _, padded in _padded_slices(counts, multiple):
        x = _rows(x_RC, padded)
        if fuses and len(x):
            # The gradient wants what was there before the GELU. The second product is a fraction of PyTorch's GELU.
            before = torch.ops.mkldnn._linear_pointwise(x, w1[e], b1[e], "none", [], "")
            hidden = torch.ops.mkldnn._linear_pointwise(x, w1[e], b1[e], "gelu", [], "tanh")
        else:
            before = torch.addmm(b1[e], x, w1[e].t())
            hidden = F.gelu(before, approximate="tanh")
        torch.addmm(b2[e], hidden, w2[e], out=y_RC[padded])
        befores.append(before)
        hiddens.append(hidden)
    return befores, hiddens, y_RC[: len(x_RC)]


@expert_loop.register_fake
def _(
    x_RC: Tensor, w1_EFC: Tensor, b1_EF: Tensor, w2_ECF: Tensor, b2_EC: Tensor, counts: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    multiple = _row_multiple(x_RC, len(counts))
    befores = [x_RC.new_empty(_rounded(count, multiple), w1_EFC.shape[1]) for count in counts]
    y_RC = x_RC.new_empty(len(x_RC) + multiple - 1, x_RC.shape[1])
    return befores, [torch.empty_like(before) for before in befores], y_RC[: len(x_RC)]


@register_flop_formula(torch.ops.mepa_ds.expert_loop)
def _flops(x_RC: torch.Size, w1_EFC: torch.Size, *_: Any, **__: Any) -> int:
    """For PyTorch's counter, which does not look into the operator: two products of shape (R, C, F)."""
    return 2 * 2 * x_RC[0] * w1_EFC[1] * w1_EFC[2]


class _ExpertLoop(torch.autograd.Function):
    """Every GEMM written where its rows or gradients belong.

    A CPU is compute-bound, and its BLAS beats the grouped kernel there. Autograd's own version of this loop would
    concatenate outputs and stack gradients once more: a tenth of the time in bf16.
    """

    @staticmethod
    def forward(
        ctx: Any, x_RC: Tensor, w1_EFC: Tensor, b1_EF: Tensor, w2_ECF: Tensor, b2_EC: Tensor, counts: list[int]
    ) -> Tensor:
        befores, hiddens, y_RC = expert_loop(x_RC, w1_EFC, b1_EF, w2_ECF, b2_EC, counts)
        ctx.save_for_backward(x_RC, w1_EFC, w2_ECF, *befores, *hiddens)
        ctx.counts = counts
        return y_RC

    @staticmethod
    def backward(ctx: Any, gy_RC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x_RC, w1_EFC, w2_ECF, *saved = ctx.saved_tensors
        befores, hiddens = saved[: len(ctx.counts)], saved[len(ctx.counts) :]
        gy_RC = gy_RC.contiguous()
        multiple = _row_multiple(x_RC, len(ctx.counts))
        gx_RC = x_RC.new_empty(len(x_RC) + multiple - 1, x_RC.shape[1])
        gw1_EFC, gw2_ECF = torch.empty_like(w1_EFC), torch.empty_like(w2_ECF)
        gb1_EF, gb2_EC = w1_EFC.new_empty(w1_EFC.shape[:2]), w2_ECF.new_empty(w2_ECF.shape[:2])
        w1, gw1, gb1 = w1_EFC.unbind(), gw1_EFC.unbind(), gb1_EF.unbind()
        w2, gw2, gb2 = w2_ECF.unbind(), gw2_ECF.unbind(), gb2_EC.unbind()
        scratch_RF = x_RC.new_empty(_rounded(max(ctx.counts, default=0), multiple), w1_EFC.shape[1])
        for e, rows, padded in _padded_slices(ctx.counts, multiple):  # an expert without rows gets zeros
            # Zeros in gy keep the padding's rows out of all sums over rows.
            gy = _padded_with_zeros(gy_RC[rows], padded.stop - padded.start)
            torch.mm(gy.t(), hiddens[e], out=gw2[e])
            torch.sum(gy, 0, out=gb2[e])
            g_before = scratch_RF[: len(gy)]
            torch.mm(gy, w2[e], out=g_before)
            torch.ops.aten.gelu_backward.grad_input(g_before, befores[e], approximate="tanh", grad_input=g_before)
            torch.mm(g_before.t(), _rows(x_RC, padded), out=gw1[e])
            torch.sum(g_before, 0, out=gb1[e])
            torch.mm(g_before, w1[e], out=gx_RC[padded])
        return gx_RC[: len(x_RC)], gw1_EFC, gb1_EF, gw2_ECF, gb2_EC, None


def _row_multiple(x_RC: Tensor, num_experts: int) -> int:
    """Of rows in a GEMM. In bf16 and fp16 a CPU's GEMMs are compiled for their sizes, and how many rows an expert has
    is new in every step: a third of the time went into that. There are few multiples of 64.
    """
    if x_RC.device.type != "cpu" or x_RC.dtype == torch.float32:
        return 1
    return 64 if len(x_RC) >= 1024 * num_experts else 32


def _fuses_gelu(x_RC: Tensor, num_experts: int) -> bool:
    """Whether a CPU's bf16 unit makes a second product, fused with GELU, cheaper than PyTorch's GELU (a slow tanh).

    With few rows an expert the weights, which are packed anew for each product, weigh more.
    """
    if x_RC.device.type != "cpu" or x_RC.dtype != torch.bfloat16 or len(x_RC) < _FUSED_ROWS * num_experts:
        return False
    return x_RC.dtype in fused_gelu_types()


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _padded_slices(counts: Sequence[int], multiple: int) -> Iterator[tuple[int, slice, slice]]:
    """(expert, its rows, its rows and some of the next experts', a multiple in all).

    What is computed for rows of the next experts is overwritten when it is their turn.
    """
    start = 0
    for e, count in enumerate(counts):
        yield e, slice(start, start + count), slice(start, start + _rounded(count, multiple))
        start += count


def _rows(x_RC: Tensor, padded: slice) -> Tensor:
    """x_RC[padded], with zeros for rows beyond the last."""
    return _padded_with_zeros(x_RC[padded], padded.stop - padded.start)


def _padded_with_zeros(x_RC: Tensor, num_rows: int) -> Tensor:
    return x_RC if len(x_RC) == num_rows else F.pad(x_RC, (0, 0, 0, num_rows - len(x_RC)))
