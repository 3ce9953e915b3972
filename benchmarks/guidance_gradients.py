"""How hard guidance pulls: `python benchmarks/guidance_gradients.py RECIPE [KEY=VALUE ...]`.

Trains a recipe's model in one process, without DeepSpeed, and at chosen steps compares two gradients in the weights
that both reach (the blocks up to the aligned one, words, positions, classes): that of the cross-entropy, and that of
weight x L_SG. A cosine of 0 says that guidance neither helps nor undoes what the cross-entropy asks of this step, and
spends its norm's share of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from mepa_ds.command_line import entry
from mepa_ds.config.base import load_config
from mepa_ds.config.pretrain import PretrainConfig
from mepa_ds.distributed import device_of, read_launch
from mepa_ds.errors import UserError
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.objective.objective import ModelInputs, PretrainingObjective
from mepa_ds.pretrain.data import open_sets, stream_of
from mepa_ds.pretrain.inputs import InputMaker
from mepa_ds.runtime.schedule import learning_rate
from mepa_ds.tokenizer.quantizer import MultiScaleQuantizer


@dataclass(frozen=True)
class Pull:
    """Compares the gradients of cross-entropy and guidance along a run."""

    recipe: tyro.conf.Positional[Path]
    """A pretraining recipe with objective.alignment."""
    overrides: tyro.conf.Positional[tuple[str, ...]] = ()
    """Keys of the recipe, as for `mepa pretrain`."""
    at: tuple[int, ...] = (0, 20, 50, 100, 150)
    """Steps at which the gradients are compared."""

    def __call__(self) -> None:
        config = load_config(PretrainConfig, self.recipe, self.overrides)
        if config.objective.alignment is None:
            raise UserError(f"{self.recipe}: objective.alignment is null: there is no guidance to look at")
        device, sets = device_of(read_launch()), open_sets(config)
        objective = PretrainingObjective(NextScaleTransformer(config.model), config.objective, sets.feature_width)
        objective.init_weights(config.seed, config.optim.mup_base_width)
        objective.to(device)
        maker = InputMaker(
            config.model, MultiScaleQuantizer.load(config.tokenizer, config.model.scales), config.seed, device
        )
        optimizer = torch.optim.AdamW(
            objective.parameters(), betas=config.optim.betas, weight_decay=config.optim.weight_decay
        )
        num_steps = config.train.num_steps(sets.num_samples)
        print("step      ce   L_SG   norm of ce   norm of guidance   their cosine")
        for step, batch in zip(tqdm(range(max(self.at) + 1), "steps"), stream_of(config, sets)(0), strict=False):
            inputs = maker.training(batch)
            if step in self.at:
                tqdm.write(f"{step:4}  {_compared(objective, inputs)}")
            optimizer.param_groups[0]["lr"] = learning_rate(config.optim, config.train.global_batch, step, num_steps)
            optimizer.zero_grad()
            objective(inputs).total.backward()
            torch.nn.utils.clip_grad_norm_(objective.parameters(), config.optim.clip or float("inf"))
            optimizer.step()


def _compared(objective: PretrainingObjective, inputs: ModelInputs) -> str:
    """Both losses, and the gradients of each alone in the weights that guidance reaches."""
    whole = objective.config
    alignment = whole.alignment
    assert alignment is not None
    shared = {name: p for name, p in objective.named_parameters() if name.startswith("transformer.")}
    gradients: list[dict[str, Tensor]] = []
    for ce_weight, weight in ((0.0, alignment.weight), (1.0, 0.0)):
        update: dict[str, Any] = {"ce_weight": ce_weight, "balance_weight": 0.0, "router_z_weight": 0.0}
        update["alignment"] = alignment.model_copy(update={"weight": weight})
        objective.config = whole.model_copy(update=update)
        losses = objective(inputs)
        found = torch.autograd.grad(losses.total, list(shared.values()), allow_unused=True, materialize_grads=True)
        gradients.append(dict(zip(shared, found, strict=True)))
    objective.config = whole
    guidance, ce = gradients
    reached = [name for name, gradient in guidance.items() if gradient.any()]
    sg, ce_there = (torch.cat([found[name].flatten() for name in reached]) for found in (guidance, ce))
    return (
        f"{losses.terms['ce'].item():.4f}  {losses.terms['alignment'].item():+.2f}   {ce_there.norm():10.4f}   "
        f"{sg.norm():16.4f}   {torch.cosine_similarity(ce_there, sg, dim=0):+12.3f}"
    )


def main() -> None:
    tyro.cli(Pull, description=__doc__)()


if __name__ == "__main__":
    entry.run(main)
