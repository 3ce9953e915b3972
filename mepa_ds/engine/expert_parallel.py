"""Expert parallelism: each rank of a group holds E / n experts. Tokens travel by uneven all-to-all; none is dropped.

Shapes: T tokens here, K choices a token, R rows sent (T K less dropped ones), Q rows received, C width,
E experts in all, J experts held here, n ranks in the expert-parallel group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups
from torch import Tensor, nn

from mepa_ds.engine.waiting import WaitingClock
from mepa_ds.models.moe.dispatch import Permute, SharedExpert, TokenPermutation, inverse_permutation
from mepa_ds.models.moe.experts import Experts
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.models.moe.routing import Routing


class _Exchange:
    """One all-to-all of rows and, in the backward pass, of their gradients in the other direction.

    `start` begins the exchange, and `finish` takes the result of `start` and ends it. Work that does not need the rows
    runs in between. Its backward pass also runs in between, because autograd runs the latest ready node first.
    """

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup, waits: WaitingClock):
        self.send, self.receive, self._group, self._waits = send, receive, group, waits
        self._travelling: tuple[Any, Tensor, Tensor] | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Returns the rows of other ranks, which must not be read before `finish`."""
        return _Start.apply(rows, self)

    def finish(self, rows: Tensor) -> Tensor:
        return _Finish.apply(rows, self)

    def begin(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(receive), *rows.shape[1:])
        work = dist.all_to_all_single(arriving, rows, receive, send, group=self._group, async_op=True)
        self._travelling = work, rows, arriving  # `rows` must live until it has been sent
        return arriving

    def wait(self) -> Tensor:
        assert self._travelling is not None
        work, _, arriving = self._travelling
        with self._waits.waiting("all_to_all"):
            work.wait()
        self._travelling = None
        return arriving


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.begin(rows, exchange.send, exchange.receive)

    @staticmethod
    def backward(ctx: Any, placeholder: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.exchange.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.exchange.begin(gradient, ctx.exchange.receive, ctx.exchange.send)
        return gradient, None  # only its shape counts here, for autograd; `_Start` returns the gradients that arrive


class ExpertParallelDispatcher:
    """Has the local dispatcher's interface, over a group of ranks. Each call has one host sync, for the row counts.

    Half of the tokens go through `shared_expert` while rows travel to their experts, and half while rows travel back.
    In the backward pass the same halves run while gradients travel.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, waits: WaitingClock | None = None):
        self.group = group
        self.waits = waits or WaitingClock()
        self.ep_size = group.size()
        self.num_experts = num_experts

    def __call__(
        self, x_TC: Tensor, routing: Routing, experts: Experts, shared_expert: SharedExpert | None = None
    ) -> Tensor:
        permutation = TokenPermutation(x_TC, routing, self.num_experts)
        sent_nJ = permutation.counts_E.view(self.ep_size, -1)
        received_nJ = torch.empty_like(sent_nJ)
        with self.waits.waiting("all_to_all"):
            dist.all_to_all_single(received_nJ, sent_nJ, group=self.group)
        counts_J = received_nJ.sum(0)
        numbers = torch.cat([sent_nJ.sum(1), received_nJ.sum(1), counts_J]).tolist()
        n = self.ep_size
        send, receive, counts = numbers[:n], numbers[n : 2 * n], numbers[2 * n :]
        half = len(x_TC) // 2
        beside: list[Tensor] = []

        there = _Exchange(send, receive, self.group, self.waits)
        x_QC = there.start(permutation.permute(sum(send)))
        order_Q = _order_by_expert(received_nJ, sum(receive))
        if shared_expert is not None:
            beside.append(shared_expert(x_TC[:half]))
        x_QC = there.finish(x_QC)
        if order_Q is None:
            y_QC = experts(x_QC, counts_J, counts)
        else:
            place_Q = inverse_permutation(order_Q)
            x_QC = Permute.apply(x_QC, order_Q, place_Q[:, None])
            y_QC = Permute.apply(experts(x_QC, counts_J, counts), place_Q, order_Q[:, None])

        back = _Exchange(receive, send, self.group, self.waits)
        y_RC = back.start(y_QC)
        if shared_expert is not None:
            beside.append(shared_expert(x_TC[half:]))
        y_TC = permutation.unpermute(back.finish(y_RC))
        return y_TC + torch.cat(beside) if beside else y_TC


def _order_by_expert(received_nJ: Tensor, num_rows: int) -> Tensor | None:
    """The order that sorts rows by expert, which arrive sorted by (source rank, local expert); None if they are so.

    They are so with one expert a rank.
    """
    ep_size, num_experts = received_nJ.shape
    if num_experts == 1:
        return None
    expert_nJ = torch.arange(num_experts, device=received_nJ.device).expand(ep_size, -1)
    expert_Q = torch.repeat_interleave(expert_nJ.reshape(-1), received_nJ.reshape(-1), output_size=num_rows)
    return expert_Q.argsort(stable=True)


class ExpertParallelFeedForward(MoEFeedForward, DeepSpeedMoE):
    """Our MoE layer as a subclass of DeepSpeed's, by which DeepSpeed's engine recognises layers with expert gradients.

    None of the code of DeepSpeed's layer runs, not even its constructor.
    """

    ep_size: int
    num_local_experts: int
    expert_group_name: str

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Does nothing: DeepSpeed calls this hook to make the groups, which `shard_experts` has already made."""


def shard_experts(model: nn.Module, ep_size: int, waits: WaitingClock | None = None) -> None:
    """Makes every MoE layer of a model on the meta device expert-parallel, in place. Needs the process group.

    Consecutive ranks form a group; rank i of a group keeps experts [i E/n, (i+1) E/n). Weights are drawn afterwards. An
    expert's values depend on its global number, so the model is the same at every ep_size. `waits` measures the
    exchanges.
    """
    if ep_size == 1:
        return
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    group, rank = groups._get_expert_parallel_group(name), groups._get_expert_parallel_rank(name)
    for parent in list(model.modules()):
        for child_name, layer in list(parent.named_children()):
            if isinstance(layer, MoEFeedForward):
                setattr(parent, child_name, _shard(layer, ep_size, rank, group, name, waits))


def _shard(
    layer: MoEFeedForward,
    ep_size: int,
    rank: int,
    group: dist.ProcessGroup,
    group_name: str,
    waits: WaitingClock | None,
) -> ExpertParallelFeedForward:
    sharded = ExpertParallelFeedForward.__new__(ExpertParallelFeedForward)
    nn.Module.__init__(sharded)
    sharded.__dict__.update(layer.__dict__)
    width, hidden = layer.experts.fc2_weight.shape[1:]
    sharded.ep_size = ep_size
    sharded.num_local_experts = layer.num_experts // ep_size
    sharded.expert_group_name = group_name
    sharded.first_expert = rank * sharded.num_local_experts
    sharded.experts = Experts(sharded.num_local_experts, width, hidden).to(layer.experts.fc1_weight.device)
    sharded.dispatcher = ExpertParallelDispatcher(group, layer.num_experts, waits)
    return sharded


def mark_expert_parameters(model: nn.Module) -> None:
    """Tells DeepSpeed to average experts' gradients only over the ranks that hold the same experts.

    Must be called after the parameters are materialised, because moving from the meta device makes new parameters.
    """
    for module in model.modules():
        if isinstance(module, ExpertParallelFeedForward):
            for parameter in module.experts.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = module.expert_group_name  # type: ignore[attr-defined]
