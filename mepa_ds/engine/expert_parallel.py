"""Expert parallelism: each rank of a group holds E / n experts, tokens travel by uneven all-to-all (D4, dropless).

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

from mepa_ds.models.moe.dispatch import Alongside, Sorted
from mepa_ds.models.moe.experts import Experts
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.models.moe.routing import Routing


class _AllToAll(torch.autograd.Function):
    """Rows to and from all ranks of a group; the gradient travels back the same way.

    The forward exchange is only started: its handle goes into `started`, and the result must not be read before
    `_wait` was called on it.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, started: list[Any]
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        rows = rows.contiguous()
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        # `rows` stays alive until it has been sent.
        started += [rows, dist.all_to_all_single(out, rows, receive, send, group=group, async_op=True)]
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        out = gradient.new_empty(sum(ctx.send), *gradient.shape[1:])
        dist.all_to_all_single(out, gradient.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None, None


def _wait(started: list[Any]) -> None:
    _, work = started
    work.wait()


class ExpertParallelDispatcher:
    """The local dispatcher's interface, over a group of ranks. One host sync a call: the row counts."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int):
        self.group = group
        self.ep_size = group.size()
        self.num_experts = num_experts

    def __call__(self, x_TC: Tensor, routing: Routing, experts: Experts, alongside: Alongside | None = None) -> Tensor:
        rows = Sorted(x_TC, routing, self.num_experts)
        received_E = torch.empty_like(rows.counts_E)
        dist.all_to_all_single(received_E, rows.counts_E, group=self.group)
        received_nJ = received_E.view(self.ep_size, -1)
        sums = torch.stack([rows.counts_E.view(self.ep_size, -1).sum(1), received_nJ.sum(1)])
        send, receive = sums.tolist()
        going: list[Any] = []
        x_QC = _AllToAll.apply(rows.x_RC, send, receive, self.group, going)
        beside_TC = None if alongside is None else alongside()
        _wait(going)
        # Rows arrive grouped by (source rank, local expert); the experts want them grouped by expert.
        expert_nJ = torch.arange(experts.num_experts, device=x_TC.device).expand(self.ep_size, -1)
        expert_Q = torch.repeat_interleave(expert_nJ.reshape(-1), received_nJ.reshape(-1), output_size=sum(receive))
        order_Q = expert_Q.argsort(stable=True)
        place_Q = torch.empty_like(order_Q)
        place_Q[order_Q] = torch.arange(len(order_Q), device=order_Q.device)
        y_QC = experts(x_QC.index_select(0, order_Q), received_nJ.sum(0)).index_select(0, place_Q)
        coming: list[Any] = []
        back_RC = _AllToAll.apply(y_QC, receive, send, self.group, coming)
        _wait(coming)
        y_TC = rows.combine(back_RC)
        return y_TC if beside_TC is None else y_TC + beside_TC


class ExpertParallelFeedForward(MoEFeedForward, DeepSpeedMoE):
    """Our MoE layer under DeepSpeed's class, by which its engine recognises layers with expert gradients.

    Nothing of DeepSpeed's layer runs, not even its constructor.
    """

    ep_size: int
    num_local_experts: int
    expert_group_name: str

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed's hook. The groups exist since `shard_experts`."""


def shard_experts(model: nn.Module, ep_size: int) -> None:
    """Makes every MoE layer of a model on the meta device expert-parallel, in place. Needs the process group.

    Consecutive ranks form a group; rank i of it keeps experts [i E/n, (i+1) E/n). Weights are drawn afterwards:
    an expert's values depend on its global number, so the model is the same at every ep_size.
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
                setattr(parent, child_name, _shard(layer, ep_size, rank, group, name))


def _shard(
    layer: MoEFeedForward, ep_size: int, rank: int, group: dist.ProcessGroup, group_name: str
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
    sharded.dispatcher = ExpertParallelDispatcher(group, layer.num_experts)
    return sharded


def mark_expert_parameters(model: nn.Module) -> None:
    """Tells DeepSpeed to average experts' gradients over the ranks that hold the same experts only.

    To be called once the parameters have memory: moving from the meta device makes new ones.
    """
    for module in model.modules():
        if isinstance(module, ExpertParallelFeedForward):
            for parameter in module.experts.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = module.expert_group_name  # type: ignore[attr-defined]
