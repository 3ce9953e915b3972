"""The routed experts one after the other, two GEMMs each: on a CPU, and on a GPU without a grouped kernel.

Shapes: R rows (one for each routed (token, choice) pair), E experts held here, C width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mepa_ds.models.feed_forward import has_fused_kernel, linear_gelu, write_gelu


def looped_experts(tensors: Sequence[Tensor], counts: list[int]) -> Tensor:
    """Computes each expert with two GEMMs of its own: the fastest way on a CPU, and where grouped GEMMs are not native.

    `tensors` are those of `experts.grouped_experts`; `counts` are the numbers of rows of the experts.
    """
    if has_fused_kernel(tensors[0]):
        return _without_gradients(tensors, counts)
    return _ExpertLoop.apply(*tensors, counts)


def _without_gradients(tensors: Sequence[Tensor], counts: list[int]) -> Tensor:
    """The loop for sampling and evaluation: one kernel for a linear layer and its GELU, and nothing is kept."""
    x_RC, w1_EFC, b1_EF, w2_ECF, b2_EC = tensors
    multiple = _row_multiple(x_RC, len(counts))
    y_RC = x_RC.new_empty(len(x_RC) + multiple - 1, x_RC.shape[1])
    w1, b1, w2, b2 = w1_EFC.unbind(), b1_EF.unbind(), w2_ECF.mT.unbind(), b2_EC.unbind()
    for e, rows, padded in _padded_slices(counts, multiple):
        if rows.stop > rows.start:
            torch.addmm(b2[e], linear_gelu(_rows(x_RC, padded), w1[e], b1[e]), w2[e], out=y_RC[padded])
    return y_RC[: len(x_RC)]


@torch.library.custom_op(
    "mepa_ds::expert_loop",
    mutates_args=(),
    schema="(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, int[] counts) -> (Tensor[], Tensor[], Tensor)",
)
def expert_loop(
    x_RC: Tensor, w1_EFC: Tensor, b1_EF: Tensor, w2_ECF: Tensor, b2_EC: Tensor, counts: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The forward pass of the loop: the GELU's derivatives and results, expert by expert, and the output (R, C).

    It is one registered operator, so that selective recomputation can keep its results. The activations of an expert
    have the padded number of rows (`_padded_slices`), so there may be more of them than rows of x.
    """
    multiple = _row_multiple(x_RC, len(counts))
    y_RC = x_RC.new_empty(len(x_RC) + multiple - 1, x_RC.shape[1])
    slopes, hiddens = list[Tensor](), list[Tensor]()
    # One unbind makes the views of all experts: with many experts, an index operation for each costs too much time.
    w1, b1, w2, b2 = w1_EFC.unbind(), b1_EF.unbind(), w2_ECF.mT.unbind(), b2_EC.unbind()
    for e, _, padded in _padded_slices(counts, multiple):
        slope = torch.addmm(b1[e], _rows(x_RC, padded), w1[e].t())  # before the GELU; its derivative takes the place
        hidden = torch.empty_like(slope)
        write_gelu(slope, hidden, slope)
        torch.addmm(b2[e], hidden, w2[e], out=y_RC[padded])
        slopes.append(slope)
        hiddens.append(hidden)
    return slopes, hiddens, y_RC[: len(x_RC)]


@expert_loop.register_fake
def _(
    x_RC: Tensor, w1_EFC: Tensor, b1_EF: Tensor, w2_ECF: Tensor, b2_EC: Tensor, counts: Sequence[int]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    multiple = _row_multiple(x_RC, len(counts))
    slopes = [x_RC.new_empty(_rounded(count, multiple), w1_EFC.shape[1]) for count in counts]
    y_RC = x_RC.new_empty(len(x_RC) + multiple - 1, x_RC.shape[1])
    return slopes, [torch.empty_like(slope) for slope in slopes], y_RC[: len(x_RC)]


@register_flop_formula(torch.ops.mepa_ds.expert_loop)
def _flops(x_RC: torch.Size, w1_EFC: torch.Size, *_: Any, **__: Any) -> int:
    """The loop's FLOPs, for PyTorch's counter, which does not look inside the operator: two (R, C, F) products."""
    return 2 * 2 * x_RC[0] * w1_EFC[1] * w1_EFC[2]


class _ExpertLoop(torch.autograd.Function):
    """The loop with gradients: each GEMM writes straight into the rows, or the slice of a gradient, that it computes.

    A CPU is compute-bound, and its BLAS is faster than the grouped kernel. Autograd's own version of this loop would
    also concatenate outputs and stack gradients, which takes a tenth of the time in bf16.
    """

    @staticmethod
    def forward(
        ctx: Any, x_RC: Tensor, w1_EFC: Tensor, b1_EF: Tensor, w2_ECF: Tensor, b2_EC: Tensor, counts: list[int]
    ) -> Tensor:
        slopes, hiddens, y_RC = expert_loop(x_RC, w1_EFC, b1_EF, w2_ECF, b2_EC, counts)
        ctx.save_for_backward(x_RC, w1_EFC, w2_ECF, *slopes, *hiddens)
        ctx.counts = counts
        return y_RC

    @staticmethod
    def backward(ctx: Any, gy_RC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        x_RC, w1_EFC, w2_ECF, *saved = ctx.saved_tensors
        slopes, hiddens = saved[: len(ctx.counts)], saved[len(ctx.counts) :]
        gy_RC = gy_RC.contiguous()
        multiple = _row_multiple(x_RC, len(ctx.counts))
        gx_RC = x_RC.new_empty(len(x_RC) + multiple - 1, x_RC.shape[1])
        gw1_EFC, gw2_ECF = torch.empty_like(w1_EFC), torch.empty_like(w2_ECF)
        gb1_EF, gb2_EC = w1_EFC.new_empty(w1_EFC.shape[:2]), w2_ECF.new_empty(w2_ECF.shape[:2])
        w1, gw1, gb1 = w1_EFC.unbind(), gw1_EFC.unbind(), gb1_EF.unbind()
        w2, gw2, gb2 = w2_ECF.unbind(), gw2_ECF.unbind(), gb2_EC.unbind()
        scratch_RF = x_RC.new_empty(_rounded(max(ctx.counts, default=0), multiple), w1_EFC.shape[1])
        for e, rows, padded in _padded_slices(ctx.counts, multiple):  # the gradients of an expert without rows become 0
            # Zeros in gy keep the rows of the padding out of all sums over rows.
            gy = _padded_with_zeros(gy_RC[rows], padded.stop - padded.start)
            torch.mm(gy.t(), hiddens[e], out=gw2[e])
            torch.sum(gy, 0, out=gb2[e])
            g_before = scratch_RF[: len(gy)]
            torch.mm(gy, w2[e], out=g_before)
            g_before.mul_(slopes[e])
            torch.mm(g_before.t(), _rows(x_RC, padded), out=gw1[e])
            torch.sum(g_before, 0, out=gb1[e])
            torch.mm(g_before, w1[e], out=gx_RC[padded])
        return gx_RC[: len(x_RC)], gw1_EFC, gb1_EF, gw2_ECF, gb2_EC, None


def _row_multiple(x_RC: Tensor, num_experts: int) -> int:
    """The number that the rows of a GEMM are rounded up to a multiple of.

    In bf16 and fp16, a CPU's library compiles a GEMM for each size, and the experts' numbers of rows are new in every
    step: a third of the time went into compiling. There are few multiples of 64.
    """
    if x_RC.device.type != "cpu" or x_RC.dtype == torch.float32:
        return 1
    return 64 if len(x_RC) >= 1024 * num_experts else 32


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _padded_slices(counts: Sequence[int], multiple: int) -> Iterator[tuple[int, slice, slice]]:
    """Yields each expert's number, the slice of its rows, and that slice rounded up to a multiple of rows.

    The rounded slice holds rows of the next experts too. Their results are overwritten when these experts' turn comes.
    """
    start = 0
    for e, count in enumerate(counts):
        yield e, slice(start, start + count), slice(start, start + _rounded(count, multiple))
        start += count


def _rows(x_RC: Tensor, padded: slice) -> Tensor:
    """x_RC[padded], with rows of zeros for those beyond the last row of x."""
    return _padded_with_zeros(x_RC[padded], padded.stop - padded.start)


def _padded_with_zeros(x_RC: Tensor, num_rows: int) -> Tensor:
    return x_RC if len(x_RC) == num_rows else F.pad(x_RC, (0, 0, 0, num_rows - len(x_RC)))
