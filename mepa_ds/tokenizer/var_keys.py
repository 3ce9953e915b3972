"""VAR's tokenizer checkpoints (`vae_ch160v4096z32.pth`): which key is which, and what sizes they tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from mepa_ds.config.base import validate
from mepa_ds.config.tokenizer import TokenizerConfig
from mepa_ds.errors import UserError

# VAR's name -> ours. Encoder and decoder keep theirs. Phi is stored in three ways, by how it is shared.
KEY_TABLE: tuple[tuple[str, str], ...] = (
    (r"encoder\.(.+)", r"encoder.\1"),
    (r"decoder\.(.+)", r"decoder.\1"),
    (r"quant_conv\.(weight|bias)", r"to_latent.\1"),
    (r"post_quant_conv\.(weight|bias)", r"from_latent.\1"),
    (r"quantize\.embedding\.weight", r"quantizer.codebook.weight"),
    (r"quantize\.quant_resi\.qresi_ls\.(\d+)\.(weight|bias)", r"quantizer.phi.\1.\2"),
    (r"quantize\.quant_resi\.qresi\.(weight|bias)", r"quantizer.phi.0.\1"),
    (r"quantize\.quant_resi\.(\d+)\.(weight|bias)", r"quantizer.phi.\1.\2"),
)
# A running count of code use, written by VAR's training and read by nothing else.
USAGE_KEY = "quantize.ema_vocab_hit_SV"


def is_var_state(state: Mapping[str, Tensor]) -> bool:
    return "quantize.embedding.weight" in state


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames VAR's keys to ours. Keys outside the table keep their names, to be reported as unexpected."""
    renamed = {}
    for name, tensor in state.items():
        if name == USAGE_KEY:
            continue
        for pattern, replacement in KEY_TABLE:
            if re.fullmatch(pattern, name):
                renamed[re.sub(pattern, replacement, name)] = tensor
                break
        else:
            renamed[name] = tensor
    return renamed


def config_of(state: Mapping[str, Tensor], scales: Sequence[int] | None, where: str) -> TokenizerConfig:
    """Reads the architecture off the shapes; `scales` cannot be read off, only their number is kept.

    Raises:
        UserError: not such a checkpoint, or `scales` not given although the weights were not made for VAR's ten.
    """
    if not is_var_state(state):
        some = ", ".join(list(state)[:3])
        raise UserError(
            f"{where}: not a VAR tokenizer: no key 'quantize.embedding.weight' (found {some}, ...). "
            "Expected a state dict such as vae_ch160v4096z32.pth"
        )
    default = TokenizerConfig()
    if scales is None:
        usage = state.get(USAGE_KEY)
        if usage is not None and len(usage) != len(default.scales):
            raise UserError(
                f"{where}: made for {len(usage)} scales, not for VAR's {len(default.scales)}: "
                "say which, as in scales=(1, 2, 3, 4)"
            )
        scales = default.scales
    levels = _count(state, r"encoder\.down\.(\d+)\.")
    channels = _shape(state, "encoder.conv_in.weight", where)[0]
    widths = [_shape(state, f"encoder.down.{level}.block.0.conv1.weight", where)[0] for level in range(levels)]
    codebook_size, code_width = state["quantize.embedding.weight"].shape
    num_phi = _count(state, r"quantize\.quant_resi\.(?:qresi_ls\.)?(\d+)\.") or 1
    has_phi = any(name.startswith("quantize.quant_resi.") for name in state)
    sizes = {
        "scales": list(scales),
        "codebook_size": codebook_size,
        "code_width": code_width,
        "channels": channels,
        "channel_multipliers": [width // channels for width in widths],
        "num_res_blocks": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "num_phi": num_phi,
        "phi_ratio": default.phi_ratio if has_phi else 0.0,
        "attention": "encoder.mid.attn_1.qkv.weight" in state,
    }
    return validate(TokenizerConfig, sizes, where)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest index that the pattern's group finds."""
    found = (re.match(pattern, name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _shape(state: Mapping[str, Tensor], name: str, where: str) -> Sequence[int]:
    if name not in state:
        raise UserError(f"{where}: not a complete VAR tokenizer: key {name!r} is missing")
    return state[name].shape
