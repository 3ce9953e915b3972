"""Every path that a GPU takes through the model, against the CPU in fp32, on the same weights and inputs.

Each check returns what it measured and raises AssertionError where that is not within its tolerance. Errors are
relative: the largest difference over the largest value. bf16 has 8 bits, so its tolerance is a few per cent.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_parts.timing import check_close, relative_error
from benchmarks.sampling import lively_model
from benchmarks.step_contenders import recipe
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.generation.sampling import sample
from mepa_ds.models.attention import SelfAttention
from mepa_ds.models.moe.expert_loop import looped_experts
from mepa_ds.models.moe.experts import grouped_experts, has_grouped_kernel
from mepa_ds.models.recomputation import Recompute
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.objective import ModelInputs, PretrainingObjective
from mepa_ds.scales import ScaleSchedule
from mepa_ds.tokenizer.tokenizer import Tokenizer

Found = dict[str, Any]
CPU = torch.device("cpu")
TEACHER_WIDTH, PATCHES = 48, 256
# Rows of 8 experts: even, odd, with empty ones (at the start and the end too), and all with one expert.
LOADS = ([16] * 8, [5, 1, 3, 7, 9, 11, 2, 13], [0, 33, 0, 0, 17, 8, 1, 0], [0, 0, 0, 129, 0, 0, 0, 0])


def experts_by_load(device: torch.device) -> Found:
    """Grouped products in bf16 and the loop in fp32: outputs and gradients of all five tensors."""
    found: Found = {}
    for counts in LOADS:
        generator = torch.Generator().manual_seed(sum(counts))
        shapes = [(sum(counts), 64), (8, 128, 64), (8, 128), (8, 64, 128), (8, 64)]
        exact = [(0.3 * torch.randn(shape, generator=generator)).bfloat16().float() for shape in shapes]
        gradient_RC = torch.randn(shapes[0], generator=generator).bfloat16().float()
        expected = _with_gradients(lambda *tensors, counts=counts: looped_experts(tensors, counts), exact, gradient_RC)  # type: ignore[misc]
        counts_E = torch.tensor(counts, device=device)
        for name, dtype, tolerance in (("grouped", torch.bfloat16, 0.03), ("loop", torch.float32, 1e-5)):
            tensors = [tensor.to(device, dtype) for tensor in exact]
            if name == "grouped":
                found["grouped_kernel"] = has_grouped_kernel(tensors)
            results = _with_gradients(
                lambda *tensors, name=name, counts=counts, counts_E=counts_E: (  # type: ignore[misc]
                    grouped_experts(tensors, counts_E) if name == "grouped" else looped_experts(tensors, counts)
                ),
                tensors,
                gradient_RC.to(device, dtype),
            )
            for number, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
                error = check_close(f"{name}, rows {counts}, tensor {number}", ours, theirs, tolerance)
                found[name] = max(found.get(name, 0.0), error)
    return found


def _with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    result = function(*inputs)
    return [result, *torch.autograd.grad(result, inputs, gradient)]


def attention(device: torch.device) -> Found:
    """The block-causal layer of all scales: outputs, gradients of the inputs and of every parameter."""
    schedule = ScaleSchedule.of((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    torch.manual_seed(0)
    layer = SelfAttention(128, 2, qk_norm=True)
    x_BLC, gradient_BLC = torch.randn(2, 2, schedule.num_tokens, 128).bfloat16().float()
    gradient_BLC = gradient_BLC / schedule.num_tokens
    found: Found = {}
    expected = _of_layer(layer, x_BLC, gradient_BLC, schedule)
    for name, dtype, tolerance in (("fp32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 0.05)):
        low = copy.deepcopy(layer).to(device, dtype)
        results = _of_layer(low, x_BLC.to(device, dtype), gradient_BLC.to(device, dtype), schedule)
        for key, value in results.items():
            found[name] = max(found.get(name, 0.0), check_close(f"{name} {key}", value, expected[key], tolerance))
    return found


def _of_layer(layer: SelfAttention, x_BLC: Tensor, gradient_BLC: Tensor, schedule: ScaleSchedule) -> dict[str, Tensor]:
    x_BLC = x_BLC.detach().requires_grad_()
    y_BLC = layer(x_BLC, schedule.bounds)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad(y_BLC, [x_BLC, *parameters.values()], gradient_BLC)
    return {"output": y_BLC} | dict(zip(["input", *parameters], gradients, strict=True))


def nano(batch: int) -> tuple[PretrainConfig, PretrainingObjective, ModelInputs]:
    """The whole objective at a small width on the CPU, with random weights, and a batch for it."""
    config = recipe("nano", batch, "fp32")
    model, schedule = config.model, config.model.schedule
    objective = PretrainingObjective(NextScaleTransformer(model), config.objective, TEACHER_WIDTH)
    objective.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    inputs = ModelInputs(
        labels_B=torch.randint(model.num_classes + 1, (batch,), generator=generator),
        inputs_BLZ=torch.randn(batch, schedule.num_tokens - 1, model.code_width, generator=generator),
        tokens_BL=torch.randint(model.codebook_size, (batch, schedule.num_tokens), generator=generator),
        features_BNP=torch.randn(batch, PATCHES, TEACHER_WIDTH, generator=generator),
        branch_scale_D2B=torch.ones(model.depth, 2, batch),
    )
    return config, objective, inputs


def moved(inputs: ModelInputs, device: torch.device) -> ModelInputs:
    tensors: dict[str, Any] = {name: value for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
    return replace(inputs, **{name: tensor.to(device) for name, tensor in tensors.items()})


def losses_and_gradients(
    objective: PretrainingObjective, inputs: ModelInputs
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The terms of the loss, and the gradient of every parameter, fp32 on the CPU."""
    objective.zero_grad(set_to_none=True)
    losses = objective(inputs)
    losses.total.backward()
    gradients = {}
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, f"no gradient: {name}"
        gradients[name] = parameter.grad.float().cpu()
    return {name: value.item() for name, value in losses.terms.items()}, gradients


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest length of a difference over the length of what is expected, and the parameter that has it.

    A gradient that is next to nothing beside all others counts as 1e-4 of them: its sums cancel.
    """
    least = 1e-4 * torch.stack([value.norm() for value in expected.values()]).norm()
    return max(
        (((found[name] - value).norm() / value.norm().clamp_min(least)).item(), name)
        for name, value in expected.items()
    )


def objective(device: torch.device) -> Found:
    """Every term of the loss and the gradient of every parameter; in bf16 a few tokens may go to another expert."""
    _, model, inputs = nano(batch=2)
    terms, gradients = losses_and_gradients(model, inputs)
    found: Found = {}
    for name, dtype, of_terms, of_gradients in (
        ("fp32", torch.float32, 1e-4, 2e-3),
        ("bf16", torch.bfloat16, 0.01, 0.25),
    ):
        low = copy.deepcopy(model).to(device, dtype)
        their_terms, their_gradients = losses_and_gradients(low, moved(inputs, device))
        for term, value in terms.items():
            error = abs(their_terms[term] - value) / max(abs(value), 1e-3)
            assert error <= of_terms, f"{name}: {term} is {their_terms[term]}, on the CPU in fp32 {value}"
            found[f"{name} {term}"] = error
        error, parameter = farthest(their_gradients, gradients)
        found |= {f"{name} gradient": error, f"{name} worst parameter": parameter}
        assert error <= of_gradients, f"{name}: gradient of {parameter}: {error:.2e}, allowed is {of_gradients:.0e}"
    return found


def recomputation(device: torch.device) -> Found:
    """Gradients with activations computed again, against those with all kept, in bf16."""
    _, model, inputs = nano(batch=2)
    model, inputs = model.to(device, torch.bfloat16), moved(inputs, device)
    _, expected = losses_and_gradients(model, inputs)
    found: Found = {}
    modes: tuple[Recompute, ...] = ("selective", "blocks")
    for mode in modes:
        model.transformer.recompute = mode
        found[mode], parameter = farthest(losses_and_gradients(model, inputs)[1], expected)
        assert found[mode] <= 0.02, f"{mode}: gradient of {parameter}: {found[mode]:.2e}, allowed is 2e-02"
    return found


def no_waits(device: torch.device) -> Found:
    """A dropless forward and backward pass in bf16, in which nothing may make the host wait for the device."""
    _, model, inputs = nano(batch=2)
    model, inputs = model.to(device, torch.bfloat16), moved(inputs, device)
    model(inputs).total.backward()  # libraries set themselves up at their first call
    with _no_waiting(device):
        model(inputs).total.backward()
    return {}


@contextmanager
def _no_waiting(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def small_tokenizer() -> Tokenizer:
    """All scales of 256 px; the networks around the quantizer are thin."""
    torch.manual_seed(0)
    config = TokenizerConfig(channels=32, num_res_blocks=1, codebook_size=512)
    return Tokenizer(config).eval().requires_grad_(False)


def tokens(device: torch.device) -> Found:
    """Tokens of latents and of images: the same. Inputs of the transformer from tokens, and decoded images: close."""
    tokenizer = small_tokenizer()
    generator = torch.Generator().manual_seed(1)
    side, width = tokenizer.schedule.grid_side, tokenizer.config.code_width
    latent_BCHW = torch.randn(4, width, side, side, generator=generator)
    images_B3HW = (
        torch.rand(1, 3, tokenizer.config.image_side, tokenizer.config.image_side, generator=generator) * 2 - 1
    )
    of_latent_BL, of_images_BL = tokenizer.quantizer.tokens_of(latent_BCHW), tokenizer.encode(images_B3HW)
    inputs_BLZ, decoded_B3HW = tokenizer.inputs_from_tokens(of_latent_BL), tokenizer.decode(of_images_BL)
    there = copy.deepcopy(tokenizer).to(device)
    found: Found = {
        "same tokens of latents": _same(there.quantizer.tokens_of(latent_BCHW.to(device)), of_latent_BL),
        "same tokens of images": _same(there.encode(images_B3HW.to(device)), of_images_BL),
    }
    assert found["same tokens of latents"] == 1, f"tokens of latents differ: {found}"
    assert found["same tokens of images"] >= 0.99, f"tokens of images differ: {found}"
    found["inputs"] = check_close("inputs", there.inputs_from_tokens(of_latent_BL.to(device)), inputs_BLZ, 1e-4)
    found["images"] = check_close("images", there.decode(of_images_BL.to(device)), decoded_B3HW, 0.01)
    return found


def _same(found: Tensor, expected: Tensor) -> float:
    return (found.cpu() == expected).float().mean().item()


def greedy_sampling(device: torch.device) -> Found:
    """Images of top_k = 1 with guidance in fp32: every position has the same code, so images differ by rounding."""
    model = lively_model(2)
    tokenizer = Tokenizer(TokenizerConfig(channels=32, num_res_blocks=1)).eval().requires_grad_(False)
    labels = [3, 997]
    expected = sample(model, tokenizer, labels, cfg=1.5, top_k=1)
    images = sample(copy.deepcopy(model).to(device), copy.deepcopy(tokenizer).to(device), labels, cfg=1.5, top_k=1)
    return {
        "images": check_close("images", images, expected, 0.01),
        "mean": relative_error(images.mean(), expected.mean()),
    }
