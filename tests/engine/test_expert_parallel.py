"""Expert parallelism against one process: the layer's outputs and gradients, and whole engine steps."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mepa_ds.config.base import apply_overrides, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.models.moe.dispatch import LocalDispatcher
from mepa_ds.models.moe.experts import Experts
from mepa_ds.models.moe.routing import Routing
from mepa_ds.objective.objective import ModelInputs
from tests.engine.ranks import run_on_ranks, take_step
from tests.hardware import needs_fp16
from tests.on_request import FULL
from tests.tiny_run import CLASSES, CODE_WIDTH, CODEBOOK, FEATURE_WIDTH, NUM_TOKENS, recipe_values

# --- the layer ---------------------------------------------------------------------------------------------------

E, C, F = 4, 8, 12
LAYER_CASES = [
    # (tokens of each rank, choices, experts that may be chosen, share of pairs dropped)
    ((5, 5, 5, 5), 2, range(E), 0.0),
    ((7, 3, 1, 4), 2, range(E), 0.0),  # uneven ranks
    ((6, 6, 6, 6), 1, [2], 0.0),  # one expert takes all tokens
    ((0, 4, 0, 4), 3, range(E), 0.0),  # ranks without tokens
    ((6, 6, 6, 6), 4, range(E), 0.0),
    ((6, 5, 6, 5), 2, range(E), 0.4),  # capacity
]


def make_case(number: int, world_size: int) -> tuple[Experts, list[Tensor], list[Routing], list[Tensor]]:
    sizes, K, allowed, dropped = LAYER_CASES[number]
    generator = torch.Generator().manual_seed(number)
    experts = Experts(E, C, F)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    xs, routings, gradients = [], [], []
    for T in sizes[:world_size]:
        xs.append(torch.randn(T, C, generator=generator).requires_grad_())
        choices = [torch.randperm(len(list(allowed)), generator=generator)[:K] for _ in range(T)]
        index = torch.tensor(list(allowed))[torch.stack(choices)] if T else torch.empty(0, K, dtype=torch.int64)
        weight = torch.rand(T, K, generator=generator).requires_grad_()
        kept = torch.rand(T, K, generator=generator) >= dropped if dropped else None
        routings.append(Routing(torch.empty(T, E), torch.empty(T, E), index, weight, kept))
        gradients.append(torch.randn(T, C, generator=generator))
    return experts, xs, routings, gradients


def check_layer(grouped: bool) -> None:
    """Every rank computes all ranks' tokens locally, and its own through the exchange."""
    from mepa_ds.engine.expert_parallel import ExpertParallelDispatcher
    from mepa_ds.models.moe import experts as module

    module.has_grouped_kernel = lambda _: grouped  # type: ignore[assignment]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert dist.group.WORLD is not None
    for number in range(len(LAYER_CASES)):
        experts, xs, routings, gradients = make_case(number, world_size)
        for x, routing, gradient in zip(xs, routings, gradients, strict=True):
            LocalDispatcher()(x, routing, experts).backward(gradient)
        with torch.no_grad():
            expected_y = LocalDispatcher()(xs[rank], routings[rank], experts)
        expected = [xs[rank].grad, routings[rank].weight_TK.grad]
        expected_experts = [parameter.grad for parameter in experts.parameters()]

        here = slice(rank * E // world_size, (rank + 1) * E // world_size)
        local = Experts(E // world_size, C, F)
        for ours, whole in zip(local.parameters(), experts.parameters(), strict=True):
            ours.data = whole.data[here].clone()
        _, xs, routings, gradients = make_case(number, world_size)
        y = ExpertParallelDispatcher(dist.group.WORLD, E)(xs[rank], routings[rank], local)
        y.backward(gradients[rank])
        torch.testing.assert_close(y, expected_y, atol=1e-5, rtol=1e-5)
        found = [xs[rank].grad, routings[rank].weight_TK.grad]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for ours, wanted in zip(local.parameters(), expected_experts, strict=True):
            assert ours.grad is not None  # also where no token came
            assert wanted is not None
            torch.testing.assert_close(ours.grad, wanted[here], atol=1e-5, rtol=1e-5)


class Beside(torch.autograd.Function):
    """Twice its tokens; tells when it runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        events.append("beside")
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.events.append("beside")
        return 2 * gradient, None


def check_overlap() -> None:
    """Work beside the experts runs while rows travel: both ways, forward and backward."""
    from mepa_ds.engine.expert_parallel import ExpertParallelDispatcher, _Exchange

    events: list[str] = []
    for name, function in (("begin", _Exchange.begin), ("wait", _Exchange.wait)):

        def logged(*arguments: Any, name: str = name, function: Any = function) -> Tensor:
            events.append(name)
            return function(*arguments)

        setattr(_Exchange, name, logged)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    experts, xs, routings, gradients = make_case(0, world_size)
    local = Experts(E // world_size, C, F)
    for ours, whole in zip(local.parameters(), experts.parameters(), strict=True):
        ours.data = whole.data[rank * E // world_size : (rank + 1) * E // world_size].clone()
    x, routing, gradient = xs[rank], routings[rank], gradients[rank]
    assert dist.group.WORLD is not None
    dispatcher = ExpertParallelDispatcher(dist.group.WORLD, E)
    y = dispatcher(x, routing, local, lambda tokens: Beside.apply(tokens, events))
    assert events == ["begin", "beside", "wait"] * 2
    y.backward(gradient)
    assert events == ["begin", "beside", "wait"] * 4
    without = x.detach().requires_grad_()
    expected = dispatcher(without, routing, local)
    expected.backward(gradient)
    torch.testing.assert_close(y, expected + 2 * x)
    assert without.grad is not None
    torch.testing.assert_close(x.grad, without.grad + 2 * gradient)


def test_the_shared_expert_overlaps_both_exchanges() -> None:
    run_on_ranks(2, check_overlap)


@pytest.mark.parametrize(("world_size", "grouped"), [(2, False), (2, True), (4, False)])
def test_exchange_equals_local_dispatch(world_size: int, grouped: bool) -> None:
    """`grouped`: with the experts of a GPU, which PyTorch emulates here."""
    run_on_ranks(world_size, check_layer, grouped)


# --- the engine --------------------------------------------------------------------------------------------------

GLOBAL_BATCH, STEPS = 12, 3
CLIP = 0.5
# With the recipe's initial head (0.02) and gates (0.001) an expert's gradient is below 1e-7: no tolerance would see it.
LIVELY = ["model.head_init=5.0", "model.adaln_gamma_init=1.0", f"optim.clip={CLIP}"]
VARIANTS = {
    "plain": [],
    "accumulate": ["train.accumulation=3"],
    "accumulate_over_step": ["train.accumulation=3", "objective.balance_over=step", "objective.router_z_weight=0.01"],
    "blocks": ["parallel.activation_checkpointing=blocks"],
    "blocks_accumulate": ["parallel.activation_checkpointing=blocks", "train.accumulation=3"],
    "selective": ["parallel.activation_checkpointing=selective"],
    "selective_accumulate": ["parallel.activation_checkpointing=selective", "train.accumulation=3"],
    "bias": ["model.moe.bias_rate=0.01", "objective.balance_weight=0"],
    "bias_accumulate": ["model.moe.bias_rate=0.01", "objective.balance_weight=0", "train.accumulation=3"],
    "smoe": ["model.moe.router=smoe"],
    "token": ["model.moe.router=token"],
    "one_local_expert_none_shared": ["model.moe.num_experts=2", "model.moe.shared_expert=false"],
    "capacity": ["model.moe.capacity_factor=0.75", "objective.balance_weight=0"],
    "expert_choice": ["model.moe.router=expert_choice", "objective.balance_weight=0"],
}
# Every rank limits, or lets experts choose among, its own tokens: the single process takes the two ranks' images as
# two micro-batches. (Expert shares would still count one micro-batch, hence no balance loss.)
PER_RANK = ["capacity", "expert_choice"]
SOME = ["plain", "accumulate_over_step", "selective_accumulate"]
MORE = [*SOME, "accumulate", "blocks", "bias_accumulate"]


def cases(world_size: int) -> list[tuple[int, str]]:
    """ep_size and variant: every variant with its experts over two ranks; MEPA_FULL_TESTS=1 runs more layouts."""
    if world_size == 1:
        return [(1, variant) for variant in VARIANTS]
    if world_size == 2:
        return [(2, variant) for variant in VARIANTS] + [(1, variant) for variant in (VARIANTS if FULL else SOME)]
    return list(itertools.product([1, 2, 4], MORE)) if FULL else [(4, "plain"), *((2, variant) for variant in SOME)]


def overrides_of(variant: str, world_size: int) -> list[str]:
    """One process takes the two ranks' images one after the other, where ranks look at their own tokens only."""
    alone = ["train.accumulation=2"] if world_size == 1 and variant in PER_RANK else []
    return VARIANTS[variant] + alone


def make_batch(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {
        "labels_B": torch.randint(CLASSES, (GLOBAL_BATCH,), generator=generator),
        "inputs_BLZ": torch.randn(GLOBAL_BATCH, NUM_TOKENS - 1, CODE_WIDTH, generator=generator),
        "tokens_BL": torch.randint(CODEBOOK, (GLOBAL_BATCH, NUM_TOKENS), generator=generator),
        "features_BNP": torch.randn(GLOBAL_BATCH, 9, FEATURE_WIDTH, generator=generator),
    }


def run_engines(folder: str) -> None:
    """Trains all cases of this world; rank 0 writes losses, norms and whole gradients."""
    from deepspeed.utils import safe_get_full_grad

    from mepa_ds.engine.engine import PretrainEngine
    from mepa_ds.engine.fragments import parameter_layout
    from mepa_ds.objective.reports import reduce_losses, routing_report

    rank, world_size = dist.get_rank(), dist.get_world_size()
    for ep_size, variant in cases(world_size):
        sizes = [f"train.global_batch={GLOBAL_BATCH}", f"parallel.ep_size={ep_size}"]
        values = apply_overrides(recipe_values(Path(folder)), [*sizes, *LIVELY, *overrides_of(variant, world_size)])
        config = validate(PretrainConfig, values, "test")
        engine = PretrainEngine(config, FEATURE_WIDTH, torch.device("cpu"))
        record: dict[str, Any] = {"losses": [], "norms": [], "routing": []}
        bias_steps = torch.zeros(2, 4, dtype=torch.int64)
        for step in range(STEPS):
            batch = make_batch(step)
            if world_size > 1:  # an evaluation in between leaves no trace
                with engine.evaluating() as transformer:
                    transformer(batch["labels_B"][rank:], batch["inputs_BLZ"][rank:])
            micro = []
            for m in range(config.train.accumulation):
                size = GLOBAL_BATCH // config.train.accumulation
                share = size // world_size
                rows = slice(m * size + rank * share, m * size + (rank + 1) * share)
                micro.append(ModelInputs(**{name: tensor[rows] for name, tensor in batch.items()}))
            gradients: dict[str, Tensor] = {}
            layout = parameter_layout(engine.objective)

            def capture(
                step_function: Any = engine._engine.step,
                gradients: dict[str, Tensor] = gradients,
                engine: PretrainEngine = engine,
                layout: Any = layout,
            ) -> None:
                if engine._engine.is_gradient_accumulation_boundary():
                    for name, parameter in engine.objective.named_parameters():
                        shape, offset = layout[name]
                        whole = torch.zeros(shape.numel())
                        local = safe_get_full_grad(parameter).flatten()
                        whole[offset : offset + len(local)] = local
                        gradients[name] = whole
                step_function()

            original, engine._engine.step = engine._engine.step, capture
            report = take_step(engine, micro, lr=0.01)
            engine._engine.step = original
            for losses in report.losses:  # no graph outlives its backward pass, nor what it saved
                kept = [losses.total, *(value for part in losses.routing.values() for value in vars(part).values())]
                assert not any(tensor.requires_grad for tensor in kept)
            terms, _, routing = reduce_losses(report.losses)
            if variant in PER_RANK:
                del terms["balance"]
            record["losses"].append(terms)
            record["routing"].append({layer: routing_report(statistics) for layer, statistics in routing.items()})
            record["norms"].append(report.grad_norm)
            if variant.startswith("bias"):
                counts_NE = sum(losses.counts_NE for losses in report.losses if losses.counts_NE is not None)
                assert isinstance(counts_NE, Tensor)
                bias_steps += torch.sign(counts_NE.mean(-1, keepdim=True) - counts_NE).long()
                blocks: Any = engine.objective.transformer.blocks
                routers = [blocks[block].ffn.router for block in routing]
                torch.testing.assert_close(torch.stack([router.bias_steps_E for router in routers]), bias_steps)
                assert counts_NE.sum() == 2 * 2 * GLOBAL_BATCH * NUM_TOKENS  # of the whole step, in both layers
            if step == 0:
                for name, whole in gradients.items():
                    if layout[name][0].numel() != engine.objective.get_parameter(name).numel():
                        # Each expert's gradient stands on world / ep_size ranks.
                        dist.all_reduce(whole)
                        whole /= world_size / ep_size
                record["gradients"] = gradients
        if rank == 0:
            torch.save(record, Path(folder) / f"{variant}_{world_size}_{ep_size}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    run_on_ranks(1, run_engines, str(folder))
    return folder


def assert_close_to_magnitude(found: dict[str, Tensor], expected: dict[str, Tensor], where: object) -> None:
    """Every tensor to 1e-5 of its largest element (and to 1e-8 where it is all but zero)."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        atol = 1e-5 * tensor.abs().max().item() + 1e-8
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0, msg=f"{where} {name}: {{}}".format)


@pytest.mark.parametrize("world_size", [2, 4])
def test_engine_steps_equal_one_process(folder: Path, world_size: int) -> None:
    """Loss terms, norms, routing records (1e-5) and all gradients (1e-5 of a tensor's largest element).

    Losses of the second step on depend on clipping, which is active at every step.
    """
    run_on_ranks(world_size, run_engines, str(folder))
    for ep_size, variant in cases(world_size):
        expected = torch.load(folder / f"{variant}_1_1.pt", weights_only=True)
        found = torch.load(folder / f"{variant}_{world_size}_{ep_size}.pt", weights_only=True)
        where = (variant, ep_size)
        for name in ("losses", "norms", "routing"):
            torch.testing.assert_close(
                found[name],
                expected[name],
                atol=1e-5,
                rtol=1e-5,
                msg=f"{(*where, name)}: {{}}".format,
            )
        assert_close_to_magnitude(found["gradients"], expected["gradients"], where)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_comparison_can_see_experts_and_clipping(folder: Path, variant: str) -> None:
    record = torch.load(folder / f"{variant}_1_1.pt", weights_only=True)
    assert min(record["norms"]) > CLIP
    experts = {name: tensor for name, tensor in record["gradients"].items() if ".experts." in name}
    assert len(experts) == 8  # two layers of two weights and two biases
    largest = [tensor.abs().max().item() for tensor in experts.values()]
    assert max(largest) > 1e-3
    assert min(largest) > 1e-4


def test_recomputation_and_accumulation_variants_differ_where_they_should(folder: Path) -> None:
    load = {name: torch.load(folder / f"{name}_1_1.pt", weights_only=True) for name in VARIANTS}
    for mode, end in itertools.product(("blocks", "selective"), ("", "_accumulate")):
        found, expected = load[mode + end], load[end.strip("_") or "plain"]
        assert_close_to_magnitude(found["gradients"], expected["gradients"], mode + end)
        torch.testing.assert_close(found["losses"], expected["losses"], atol=1e-6, rtol=1e-5)
    # Cross-entropy does not care about micro-batches; expert shares do.
    assert load["accumulate"]["losses"][0]["ce"] == pytest.approx(load["plain"]["losses"][0]["ce"], rel=1e-6)
    assert load["accumulate"]["losses"][0]["balance"] != load["plain"]["losses"][0]["balance"]
    assert load["accumulate_over_step"]["losses"][0]["balance"] != load["accumulate"]["losses"][0]["balance"]


def run_balance_alone(folder: str) -> None:
    """The router's gradient of nothing but the balance loss, in fp32 and under fp16's loss scale."""
    from deepspeed.utils import safe_get_full_grad

    from mepa_ds.engine.engine import PretrainEngine

    record: dict[str, Any] = {}
    for precision in ("fp32", "fp16"):
        overrides = [f"parallel.precision={precision}", "objective.ce_weight=0", "objective.alignment=null"]
        overrides += ["objective.balance_weight=0.01", "train.accumulation=2", f"train.global_batch={GLOBAL_BATCH}"]
        config = validate(PretrainConfig, apply_overrides(recipe_values(Path(folder)), [*LIVELY, *overrides]), "test")
        engine = PretrainEngine(config, None, torch.device("cpu"))
        name = "transformer.blocks.0.ffn.router.gate.weight"
        router = engine.objective.get_parameter(name)
        rows = GLOBAL_BATCH // 2
        batch = {key: tensor for key, tensor in make_batch(0).items() if key != "features_BNP"}
        micro = [ModelInputs(**{k: tensor[m * rows : (m + 1) * rows] for k, tensor in batch.items()}) for m in range(2)]
        original = engine._engine.step

        def capture(
            original: Any = original,
            engine: PretrainEngine = engine,
            router: nn.Parameter = router,
            precision: str = precision,
        ) -> None:
            if engine._engine.is_gradient_accumulation_boundary():
                scale = engine.zero.loss_scaler.cur_scale
                record[precision] = {"scale": scale, "gradient": safe_get_full_grad(router).float().clone() / scale}
            original()

        engine._engine.step = capture
        report = take_step(engine, micro, lr=0.0)
        while not report.applied:  # the first loss scales may be too large
            report = take_step(engine, micro, lr=0.0)
        record[precision]["norm"] = report.grad_norm
    torch.save(record, Path(folder) / "balance.pt")


@needs_fp16
def test_the_balance_gradient_is_scaled_with_the_loss(tmp_path: Path) -> None:
    """fp16 against fp32, to 2 % of the largest element: unscaled it would be smaller by the loss scale."""
    run_on_ranks(1, run_balance_alone, str(tmp_path))
    record = torch.load(tmp_path / "balance.pt", weights_only=True)
    expected, found = record["fp32"]["gradient"], record["fp16"]["gradient"]
    assert record["fp16"]["scale"] >= 256
    assert expected.abs().max() > 1e-5
    torch.testing.assert_close(found, expected, atol=0.02 * expected.abs().max().item(), rtol=0)
    assert record["fp16"]["norm"] == pytest.approx(record["fp32"]["norm"], rel=0.02)
