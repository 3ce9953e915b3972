"""`python pretrain.py RECIPE [key=value ...]`, alone or under any launcher."""

from __future__ import annotations

from mepa_ds.cli.recipes import read_recipe
from mepa_ds.config.pretrain import PretrainConfig

DESCRIPTION = """Pretrains a model by a recipe, or resumes the run in its output_dir.

one process   python pretrain.py recipes/quickstart.yaml
two ranks     torchrun --nproc-per-node 2 pretrain.py recipes/quickstart.yaml parallel.ep_size=2
DeepSpeed     deepspeed --num_gpus 8 pretrain.py recipes/mepa_d16.yaml
srun          srun python pretrain.py recipes/mepa_d16.yaml     (MASTER_ADDR and MASTER_PORT set)
"""


def main(argv: list[str]) -> None:
    config = read_recipe(argv, "pretrain.py", DESCRIPTION, PretrainConfig)
    from mepa_ds.loops.pretraining import pretrain  # DeepSpeed is slow to import: not before the recipe is valid

    pretrain(config)
