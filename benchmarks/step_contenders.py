"""The contenders of benchmarks/train_step.py: each is a function that takes one optimizer step.

Shapes: B batch, L tokens of all scales, T = B L, C width, K choices a token, V codebook, N patches, P teacher width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.public_way import PlainViT, PublicWay, interpolated_alignment, mask_of, masked_attention, masked_experts
from mepa_ds.config.base import validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.data.codecs import FeatureDecoder, codec_named
from mepa_ds.data.training import TrainingBatch
from mepa_ds.engine.engine import PretrainEngine
from mepa_ds.models.moe.dispatch import LocalDispatcher, SharedExpert
from mepa_ds.models.moe.experts import Experts
from mepa_ds.models.moe.routing import Routing
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.objective import ModelInputs, PretrainingObjective
from mepa_ds.pretrain.inputs import InputMaker
from mepa_ds.tokenizer.quantizer import MultiScaleQuantizer
from mepa_ds.tokenizer.tokenizer import Tokenizer

CONTENDERS = (
    "public", "public model",
    "no-stored", "no-prefixes", "no-summed", "no-dispatch", "no-matrices", "no-loss", "no-engine",
)  # fmt: skip
ALL = (*CONTENDERS, "compiled", "dense")
NUM_BATCHES = 5
NANO = {"depth": 2, "width": 128, "num_heads": 4, "moe": {"num_experts": 4}, "num_classes": 10}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def recipe(model: str, batch: int, dtype: str, compiled: bool = False) -> PretrainConfig:
    """The recipe of a run at these sizes: stored tokens and features, one rank, ZeRO-2."""
    return validate(
        PretrainConfig,
        {
            "output_dir": "unused",
            "tokenizer": "unused",
            "data": {"tokens": "unused", "features": "unused"},
            "model": NANO if model == "nano" else {"preset": model},
            "objective": {} if "mepa" in model or model == "nano" else {"alignment": None},
            "train": {"steps": 1000, "global_batch": batch},
            "parallel": {"precision": dtype, "compile": compiled},
        },
        "recipe",
    )


class Contestants:
    """Models, data and steps of one model size, batch and type. Random weights and data; all contenders have the same.

    `step(name)` returns a function without arguments that takes one step of a contender.
    """

    def __init__(self, model: str, batch: int, dtype: str, device: torch.device):
        self.config, self.device, self.dtype = recipe(model, batch, dtype), device, TYPES[dtype]
        self._model_name, self._dtype_name = model, dtype
        self._tokenizer_config = TokenizerConfig(scales=self.config.model.scales)
        self.quantizer = MultiScaleQuantizer(self._tokenizer_config).to(device).requires_grad_(False)
        self.aligned = self.config.objective.alignment is not None
        self.feature_width = PlainViT.WIDTH if self.aligned else None
        self._batches = [self._draw_batch(batch, seed) for seed in range(NUM_BATCHES)]
        self._turn = 0
        self.inputs = InputMaker(self.config.model, self.quantizer, 0, device)
        self._engines: dict[str, PretrainEngine] = {}
        self._plains: dict[bool, tuple[nn.Module, torch.optim.Optimizer]] = {}

    # Networks that only some contenders run.

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer(self._tokenizer_config).to(self.device).eval().requires_grad_(False)
        tokenizer.quantizer = self.quantizer
        return tokenizer

    @cached_property
    def teacher(self) -> PlainViT | None:
        return PlainViT().to(self.device).eval().requires_grad_(False) if self.aligned else None

    @cached_property
    def _images(self) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1], of each batch."""
        side, generator = self._tokenizer_config.image_side, torch.Generator().manual_seed(0)
        shape = (len(self.batch.labels_B), 3, side, side)
        return [(torch.rand(shape, generator=generator) * 2 - 1).to(self.device) for _ in self._batches]

    @property
    def batch(self) -> TrainingBatch:
        """The first one."""
        return self._batches[0]

    def _draw_batch(self, batch: int, seed: int) -> TrainingBatch:
        model, generator = self.config.model, torch.Generator().manual_seed(seed)
        codec, patches = codec_named("int8"), (PlainViT.SIDE // PlainViT.PATCH) ** 2
        features = torch.randn(batch, patches, PlainViT.WIDTH, generator=generator)
        return TrainingBatch(
            tokens_BL=torch.randint(model.codebook_size, (batch, model.schedule.num_tokens), generator=generator),
            labels_B=torch.randint(model.num_classes, (batch,), generator=generator),
            weight_B=torch.ones(batch),
            positions_B=torch.arange(batch) + seed * batch,
            keys=("",) * batch,
            next_position=(seed + 1) * batch,
            stored_features=codec.encode(features) if self.aligned else {},
            decoder=FeatureDecoder(codec) if self.aligned else None,
        )

    def _next(self) -> TrainingBatch:
        """Another batch at every step, so that experts have other numbers of rows, as in training."""
        self._turn = (self._turn + 1) % NUM_BATCHES
        return self._batches[self._turn]

    def step(self, name: str) -> Callable[[], None]:
        if name in ("public", "public model"):
            return partial(self._public_step, online=name == "public")
        if name == "no-engine":
            return self._step_without_engine
        if name in ("ours", "compiled", "dense"):
            return partial(self._our_step, name)
        if name == "no-stored":
            return partial(self._our_step, "ours", online=True)
        return partial(self._without, WITHOUT[name])

    # The public way.

    def _plain(self, public: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Losses with fp32 weights of their own, by the public way or ours, and torch's AdamW."""
        if public not in self._plains:
            transformer = NextScaleTransformer(self.config.model)
            losses: nn.Module = PretrainingObjective(transformer, self.config.objective, self.feature_width)
            losses = (PublicWay(losses) if public else losses).to(self.device).train()  # type: ignore[arg-type]
            fused = self.device.type == "cuda"
            optimizer = torch.optim.AdamW(losses.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=fused)
            self._plains[public] = losses, optimizer
        return self._plains[public]

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _public_step(self, online: bool) -> None:
        public, optimizer = self._plain(public=True)
        drawn = self._next()
        batch = drawn.to(self.device)
        tokens_BL, features_BNP = batch.tokens_BL, batch.features_BNC
        if online:
            tokens_BL, features_BNP = self._encode()
        given = ModelInputs(
            labels_B=batch.labels_B,
            inputs_BLZ=interpolated_inputs(self.quantizer, tokens_BL),
            tokens_BL=tokens_BL,
            features_BNP=features_BNP,
            branch_scale_D2B=self.inputs.training(drawn).branch_scale_D2B,
        )
        with self._autocast():
            loss = public(given)
        self._update_plain(public, optimizer, loss)

    def _encode(self) -> tuple[Tensor, Tensor | None]:
        """Tokens in fp32, as VAR's trainer has them, and features under autocast."""
        with torch.no_grad():
            tokens_BL = self.tokenizer.encode(self._images[self._turn])
            with self._autocast():
                return tokens_BL, None if self.teacher is None else self.teacher(self._images[self._turn])

    def _update_plain(self, objective: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # Ours.

    def _engine(self, name: str) -> PretrainEngine:
        """That of "ours", "compiled" or "dense"."""
        if name not in self._engines:
            batch, compiled = len(self.batch.labels_B), name == "compiled"
            config = recipe(self._model_name, batch, self._dtype_name, compiled)
            if name == "dense":
                config = config.model_copy(update={"model": config.model.model_copy(update={"moe": None})})
            self._engines[name] = PretrainEngine(config, self.feature_width, self.device)
        return self._engines[name]

    def _our_step(self, name: str, online: bool = False) -> None:
        engine = self._engine(name)
        inputs = self.inputs.training(self._next())
        if online:
            tokens_BL, inputs.features_BNP = self._encode()
            inputs.inputs_BLZ, inputs.tokens_BL = self.quantizer.inputs_from_tokens(tokens_BL), tokens_BL
        engine.begin_step()
        engine.backward(engine.forward(inputs))
        engine.update(1e-5)

    def _step_without_engine(self) -> None:
        objective, optimizer = self._plain(public=False)
        with self._autocast():
            loss = objective(self.inputs.training(self._next())).total
        self._update_plain(objective, optimizer, loss)

    def _without(self, switched_off: Callable[[PretrainingObjective], Any]) -> None:
        with switched_off(self._engine("ours").objective):
            self._our_step("ours")


def interpolated_inputs(quantizer: MultiScaleQuantizer, tokens_BL: Tensor) -> Tensor:
    """The transformer's inputs as VAR computes them: codes enlarged by bicubic interpolation, scale by scale."""
    f_hat_BCHW = quantizer.empty_f_hat(len(tokens_BL))
    inputs = []
    for k, tokens_Bl in enumerate(quantizer.schedule.split(tokens_BL)[:-1]):
        f_hat_BCHW = quantizer.add_scale(f_hat_BCHW, tokens_Bl, k)
        inputs.append(quantizer.next_input(f_hat_BCHW, k))
    return torch.cat(inputs, dim=1).detach()


def _each(experts: Experts) -> list[Callable[[Tensor], Tensor]]:
    """Every expert as a function. One unbind makes all views: the gradient of an index would fill the whole stack."""
    stacks = [p.unbind() for p in (experts.fc1_weight, experts.fc1_bias, experts.fc2_weight, experts.fc2_bias)]

    def expert(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)

    return [partial(expert, *weights) for weights in zip(*stacks, strict=True)]


class MaskLoopDispatcher:
    """Boolean-mask experts with our dispatcher's interface."""

    def __call__(
        self, x_TC: Tensor, routing: Routing, experts: Experts, shared_expert: SharedExpert | None = None
    ) -> Tensor:
        weight_TK = routing.weight_TK.to(x_TC.dtype)
        y_TC = masked_experts(x_TC, routing.expert_index_TK, weight_TK, _each(experts))
        return y_TC if shared_expert is None else y_TC + shared_expert(x_TC)


@contextmanager
def _without_dispatch(objective: PretrainingObjective) -> Iterator[None]:
    ffns: list[Any] = [block.ffn for block in objective.transformer.blocks]  # type: ignore[union-attr]
    layers = [ffn for ffn in ffns if hasattr(ffn, "dispatcher")]
    for layer in layers:
        layer.dispatcher = MaskLoopDispatcher()
    try:
        yield
    finally:
        for layer in layers:
            layer.dispatcher = LocalDispatcher()


@contextmanager
def _without_prefixes(objective: PretrainingObjective) -> Iterator[None]:
    mask_11LL = mask_of(objective.transformer.schedule, objective.transformer.head.weight.device)

    def attention(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, bounds: object, softmax_scale: float) -> Tensor:
        return masked_attention(q_BHLD, k_BHLD, v_BHLD, mask_11LL, softmax_scale).transpose(1, 2)

    with patch("mepa_ds.models.attention.prefix_attention", attention):
        yield


def _without_summed(objective: PretrainingObjective) -> Any:
    def slices(x_BHLD: Tensor, ends: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(x_BHLD[:, :, :end] for end in ends)

    return patch("mepa_ds.models.attention.prefixes", slices)


def _without_matrices(objective: PretrainingObjective) -> Any:
    return patch("mepa_ds.objective.objective.alignment_loss", interpolated_alignment)


def _without_loss(objective: PretrainingObjective) -> Any:
    def losses(logits_BLV: Tensor, tokens_BL: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits_BLV.float()
        loss_BL = F.cross_entropy(logits.transpose(1, 2), tokens_BL, reduction="none", label_smoothing=label_smoothing)
        return loss_BL, loss_BL.detach(), (logits.detach().argmax(-1) == tokens_BL).float()

    return patch("mepa_ds.objective.objective.token_losses", losses)


WITHOUT: dict[str, Callable[[PretrainingObjective], Any]] = {
    "no-prefixes": _without_prefixes,
    "no-summed": _without_summed,
    "no-dispatch": _without_dispatch,
    "no-matrices": _without_matrices,
    "no-loss": _without_loss,
}
