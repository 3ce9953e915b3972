"""A run against the same training written out in plain torch (tests/reference.py): every number, not a comparison.

Layouts that agree with each other, and resumed runs that equal uninterrupted ones, are blind to what is wrong in all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mepa_ds.checkpoint.files import checkpoint_name
from mepa_ds.checkpoint.store import read_tensors
from mepa_ds.config.base import apply_overrides, validate
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.data.shards.index import MadeBy
from mepa_ds.data.shards.writer import npy_bytes
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.objective import PretrainingObjective
from mepa_ds.random_streams import uniforms
from mepa_ds.runtime.metrics import read_metrics
from mepa_ds.tokenizer.tokenizer import Tokenizer
from mepa_ds.weights.directories import read_state_dict
from tests.ranks import arguments, finish
from tests.reference import AdamW, alignment, epoch_order, forward, read_samples
from tests.tiny_run import CLASSES, FEATURE_WIDTH, SCALES, make_run, recipe_values, write_set

STEPS, BATCH, COUNT, SEED = 8, 8, 40, 5
POISONED = 7
# Residual gates, head and rates are large enough that every term shows, eps so large that Adam amplifies no rounding.
SETTINGS = [
    f"seed={SEED}", f"train.steps={STEPS}", "data.on_damaged=skip",
    "model.head_init=5.0", "model.adaln_gamma_init=1.0", "model.class_dropout=0.2", "model.drop_path=0.4",
    "model.moe.every=2", "model.moe.bias_rate=0.02",
    "objective.ce_weight=1.5", "objective.alignment.weight=0.7", "objective.alignment.until=0.75",
    "objective.balance_weight=0.3", "objective.router_z_weight=0.1",
    "optim.base_lr=0.32", "optim.betas=[0.8,0.9]", "optim.eps=1e-3", "optim.weight_decay=0.5", "optim.warmup=0.25",
    "optim.warmup_start=0.1", "optim.clip=0.5", "optim.ema=0.75",
    f"log.evaluate_every={STEPS}", f"log.checkpoint_every={STEPS}",
]  # fmt: skip
PEAK = 0.32 * BATCH / 256
# Two steps of warm-up from a tenth; then flat for 5 % of what remains, and linearly down to a tenth at the last step.
RATES = [0.1, 0.55, 1.0, *(0.1 + 0.9 * (1 - p) / 0.95 for p in (0.2, 0.4, 0.6, 0.8)), 0.1]
# The same with muP, from half of the width, and with the schedule wsd: half of the steps are its cooldown.
MUP, MULTIPLIER = ["optim.mup_base_width=16", "optim.schedule=wsd", "optim.warmup_steps=2", "optim.cooldown=0.5"], 2.0
COOLDOWN = [0.1, 0.55, 1.0, 1.0, *(0.1 + 0.9 * (1 - (passed / 4) ** 0.5) for passed in (1, 2, 3, 4))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training features of one image are NaN; of 11 held-out images, the fifth is damaged."""
    folder = tmp_path_factory.mktemp("by_hand")
    make_run(folder)
    features = [sample["features.npy"] for sample in read_samples(folder / "train.features")]
    features[POISONED] = features[POISONED] * np.float16("nan")
    made_by = MadeBy(name="random", identity="0", settings={"codec": "fp16", "width": FEATURE_WIDTH, "grid_side": 3})
    write_set(folder / "poisoned.features", "features", made_by, [{"features.npy": npy_bytes(f)} for f in features])
    shard = folder / "heldout.tokens/shard-000000.tar"
    content, start = bytearray(shard.read_bytes()), 0
    for _ in range(5):
        start = content.index(b"\x93NUMPY", start + 1)
    content[start : start + 6] = b"broken"
    shard.write_bytes(content)
    return folder


def train_by_hand(folder: Path, mup: bool) -> tuple[list[dict[str, Any]], AdamW, torch.Tensor]:
    """Records of all steps, the optimizer at the end, and how far the experts' bias has moved."""
    values = apply_overrides(recipe_values(folder), SETTINGS)
    rates = COOLDOWN if mup else RATES
    config = validate(PretrainConfig, values, "test")
    objective = PretrainingObjective(NextScaleTransformer(config.model), config.objective, FEATURE_WIDTH)
    objective.init_weights(SEED, 16 if mup else None)
    weights = {name: p.detach().double().requires_grad_() for name, p in objective.named_parameters()}
    optimizer = AdamW(weights, betas=(0.8, 0.9), eps=1e-3, decay=0.5, clip=0.5, ema=0.75, m=MULTIPLIER if mup else 1.0)
    tokens, features = read_samples(folder / "train.tokens"), read_samples(folder / "poisoned.features")
    quantizer = Tokenizer.load(folder / "tokenizer").quantizer
    stream = [number for epoch in range(2) for number in epoch_order(SEED, epoch, COUNT)]
    steps_E, records = torch.zeros(4), list[dict[str, Any]]()
    for step in range(STEPS):
        numbers = stream[step * BATCH : (step + 1) * BATCH]
        tokens_BL = torch.tensor(np.stack([tokens[n]["tokens.npy"] for n in numbers]).astype(np.int64))
        labels_B = torch.tensor([int(tokens[n]["cls"]) for n in numbers])
        features_BNP = torch.tensor(np.stack([features[n]["features.npy"] for n in numbers])).double()
        positions_B = np.arange(step * BATCH, (step + 1) * BATCH)
        labels_B[torch.from_numpy(uniforms(SEED, "class_dropout", positions_B, 1)[:, 0] < 0.2)] = CLASSES
        drawn_D2B = torch.from_numpy(uniforms(SEED, "drop_path", positions_B, 4)).T.reshape(2, 2, BATCH)
        kept_D11 = torch.tensor([1.0, 0.6])[:, None, None]  # the first block always runs, the last one at 1 - 0.4
        kept_D2B = (drawn_D2B < kept_D11) / kept_D11
        model = {n.removeprefix("transformer."): w for n, w in weights.items() if n.startswith("transformer.")}
        inputs = quantizer.inputs_from_tokens(tokens_BL)
        biases = [0.02 * steps_E]
        out = forward(model, labels_B, inputs, scales=SCALES, num_heads=2, biases=biases, kept_D2B=kept_D2B)
        ((counts_E, probs_E, z),) = out.layers
        strength = max(1 - step / 6, 0)  # of guidance, whose last two steps have none
        terms = {
            "ce": F.cross_entropy(out.logits_BLV.flatten(0, 1), tokens_BL.flatten()),
            "alignment": alignment(weights, out.hidden_BLC[1], features_BNP, SCALES, {2, 3})
            if strength
            else 0 * torch.stack([w.sum() for n, w in weights.items() if n.startswith("projector.")]).sum(),
            "balance": 4 * (counts_E / counts_E.sum() * probs_E).sum(),
            "router_z": z,
        }
        loss = (
            1.5 * terms["ce"] + 0.7 * strength * terms["alignment"] + 0.3 * terms["balance"] + 0.1 * terms["router_z"]
        )
        norm, lr = optimizer.step(loss, PEAK * rates[step]), PEAK * rates[step]
        applied = bool(np.isfinite(norm))
        if applied:
            steps_E = steps_E + torch.sign(counts_E.float().mean() - counts_E.float())
        terms |= {"loss": loss, "accuracy": (out.logits_BLV.argmax(-1) == tokens_BL).double().mean()}
        record = {"lr": lr, "applied": applied, "grad_norm": norm}
        records.append(record | {name: term.item() for name, term in terms.items()})
    return records, optimizer, steps_E


@pytest.mark.parametrize(("ranks", "ep_size", "mup"), [(2, 1, False), (2, 2, False), (2, 2, True)])
def test_a_run_is_what_the_formulas_say(folder: Path, ranks: int, ep_size: int, mup: bool) -> None:
    """Order of images, losses and their weights, global norm, clipping, AdamW, decay, rates, bias, average, a skip."""
    name = f"run{ranks}{ep_size}{mup}"
    features = f"data.features={folder}/poisoned.features"
    log = finish(
        arguments(folder, name, *SETTINGS, *(MUP if mup else []), features, f"parallel.ep_size={ep_size}"),
        ranks,
        folder / f"{name}.log",
    )
    expected, optimizer, steps_E = train_by_hand(folder, mup)
    output = folder / name
    found = [record for record in read_metrics(output / "metrics.jsonl") if record["event"] == "train"]
    assert [record["applied"] for record in expected].count(False) >= 1, "no step had the image that is not finite"
    assert sum(record["applied"] and record["grad_norm"] > 0.5 for record in expected) >= 4, "nothing was clipped"
    assert steps_E.unique().numel() > 1, log
    for ours, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            if theirs["applied"] or key in ("lr", "applied"):  # a record is of the steps that were applied
                assert ours[key] == pytest.approx(value, rel=2e-4, abs=1e-6), (ours["step"], key)
    checkpoint = output / "checkpoints" / checkpoint_name(STEPS)
    kinds = {"master": optimizer.weights, "exp_avg": optimizer.first, "exp_avg_sq": optimizer.second}
    stored = read_tensors(checkpoint, [f"{kind}/{name}" for kind in kinds for name in optimizer.weights])
    for kind, tensors in kinds.items():
        for name, tensor in tensors.items():
            value = tensor.detach().flatten().float()
            atol = 2e-4 * (PEAK if kind == "master" else float(value.abs().max())) + 1e-9
            torch.testing.assert_close(stored[f"{kind}/{name}"], value, rtol=1e-5, atol=atol, msg=f"{kind}/{name}")
    averages = read_state_dict(output / "last_ema")
    for name, tensor in optimizer.average.items():
        if name.startswith("transformer."):
            own = averages[name.removeprefix("transformer.")]
            torch.testing.assert_close(own, tensor.float(), rtol=1e-5, atol=2e-4 * PEAK, msg=name)
    bias_E = averages["blocks.1.ffn.router.bias_steps_E"]
    assert bias_E.tolist() == steps_E.tolist()
    check_heldout(folder, output)


def check_heldout(folder: Path, output: Path) -> None:
    """The last weights, image after image: 9 whole ones of 10, each once, on two ranks that pad their last batches."""
    samples = [sample for sample in read_samples(folder / "heldout.tokens") if "tokens.npy" in sample]
    assert len(samples) == 9
    weights = {name: tensor.double() for name, tensor in read_state_dict(output / "last").items()}
    biases = [0.02 * weights["blocks.1.ffn.router.bias_steps_E"].float()]
    quantizer = Tokenizer.load(folder / "tokenizer").quantizer
    losses, hits = [], []
    for sample in samples:
        tokens_BL = torch.tensor(sample["tokens.npy"].astype(np.int64))[None]
        inputs, labels_B = quantizer.inputs_from_tokens(tokens_BL), torch.tensor([int(sample["cls"])])
        logits = forward(weights, labels_B, inputs, scales=SCALES, num_heads=2, biases=biases).logits_BLV
        losses.append(F.cross_entropy(logits[0], tokens_BL[0], reduction="none"))
        hits.append((logits[0].argmax(-1) == tokens_BL[0]).double())
    (record,) = [record for record in read_metrics(output / "metrics.jsonl") if record["event"] == "heldout"]
    assert record["damaged_samples"] == 1
    for key, rows in (("ce", torch.stack(losses)), ("accuracy", torch.stack(hits))):
        assert record[key] == pytest.approx(rows.mean().item(), abs=1e-5)
        parts = [rows[:, start:end].mean().item() for start, end in ((0, 1), (1, 5), (5, 14))]
        assert record[f"{key}_scale"] == pytest.approx(parts, abs=1e-5)
        assert record[f"{key}_last"] == pytest.approx(parts[-1], abs=1e-5)
