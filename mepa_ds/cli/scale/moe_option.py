"""The option `--moe`: experts as key=value pairs."""

from __future__ import annotations

from mepa_ds.config.base import parse_yaml, validate
from mepa_ds.config.model import MoEConfig
from mepa_ds.errors import UserError

DENSE = "dense"
MoEText = str


def moe_of(text: MoEText) -> MoEConfig | None:
    """Returns the experts that `num_experts=8,top_k=2` stands for; None for `dense`.

    Raises:
        UserError: an unknown key or a wrong value.
    """
    if text == DENSE:
        return None
    values = {}
    for pair in text.split(","):
        key, separator, value = pair.partition("=")
        if not separator:
            raise UserError(f"--moe {text}: write dense, or key=value pairs such as num_experts=8,top_k=2")
        if key.strip() in values:
            raise UserError(f"--moe {text}: {key.strip()} is given twice")
        values[key.strip()] = parse_yaml(value, f"--moe {text}")
    return validate(MoEConfig, values, f"--moe {text}")
