"""VAR's tokenizer checkpoints (`vae_ch160v4096z32.pth`): the table of their keys, and the sizes read from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mepa_ds import distributed
from mepa_ds.config.base import validate
from mepa_ds.config.tokenizer import TokenizerConfig, checked_sides
from mepa_ds.errors import UserError
from mepa_ds.weights.directories import size_in, with_match
from mepa_ds.weights.kinds import but_another
from mepa_ds.weights.state_dicts import Wanted
from mepa_ds.weights.var_settings import schedule_in, setting_in

# What VAR's names begin with -> what ours begin with. Phi is stored in three ways, by how it is shared.
KEY_TABLE = (
    ("encoder.", "encoder."),
    ("decoder.", "decoder."),
    ("quant_conv.", "to_latent."),
    ("post_quant_conv.", "from_latent."),
    ("quantize.embedding.", "quantizer.codebook."),
    ("quantize.quant_resi.qresi_ls.", "quantizer.phi."),
    ("quantize.quant_resi.qresi.", "quantizer.phi.0."),
    ("quantize.quant_resi.", "quantizer.phi."),
)
_PHI = "quantize.quant_resi."
_CODEBOOK = "quantize.embedding.weight"
WANTED = Wanted(
    "VAR's tokenizer",
    (_CODEBOOK, "quant_conv.weight", "post_quant_conv.weight", "encoder.conv_in.weight", "decoder.conv_in.weight"),
)
# A running count of code use, written by VAR's training and read by nothing else.
USAGE_KEY = "quantize.ema_vocab_hit_SV"


# Appended to a name that would otherwise be taken for one of ours, or name a tensor twice.
OUTSIDE = " (not in VAR's layout)"


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames VAR's keys to ours. Keys outside the table keep their names, to be reported as unexpected."""
    translated: dict[str, Tensor] = {}
    for name, tensor in state.items():
        known = name.startswith(tuple(theirs for theirs, _ in KEY_TABLE))
        ours = _renamed(name, KEY_TABLE) if known else name
        if ours in translated or (not known and name.startswith(tuple(ours for _, ours in KEY_TABLE))):
            ours = name + OUTSIDE
        if name != USAGE_KEY:
            translated[ours] = tensor
    return translated


def names_in(state: Mapping[str, Tensor]) -> Callable[[str], str]:
    """Our name -> the name in this file, also of a parameter that is missing there."""
    inverse: dict[str, str] = {}
    for theirs, ours in KEY_TABLE:
        if not theirs.startswith(_PHI) or any(name.startswith(theirs) for name in state):
            inverse.setdefault(ours, theirs)
    table = sorted(inverse.items(), key=lambda row: -len(row[0]))
    return lambda name: name if name.endswith(OUTSIDE) else _renamed(name, table)


def _renamed(name: str, table: Sequence[tuple[str, str]]) -> str:
    for old, new in table:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def config_of(
    state: Mapping[str, Tensor],
    notes: Sequence[Mapping[str, Any]],
    scales: Sequence[int] | None,
    phi_ratio: float | None,
    where: str,
) -> TokenizerConfig:
    """Reads the architecture off the shapes, and the rest off the settings beside the weights.

    Args:
        scales: any schedule for these weights; None: the one in the settings, or VAR's ten.
        phi_ratio: None: the one in the settings, or VAR's 0.5 (for sizes that are not VAR's, a line on stderr says so).

    Raises:
        UserError: not such a checkpoint; scales not given although the weights were not made for VAR's ten; a ratio
            that is not the settings'; codes that are normalised.
    """
    _check_is_vars(state, notes, where)
    sides = checked_sides(_scales_of(state, notes, where) if scales is None else scales, where)

    def size(*places: tuple[str, int, int]) -> int:
        return size_in(state, places, where)

    first = "encoder.down.0.block.0"
    channels = size(
        ("encoder.conv_in.weight", 4, 0), ("encoder.conv_in.bias", 1, 0),
        (f"{first}.norm1.weight", 1, 0), (f"{first}.conv1.weight", 4, 1),
    )  # fmt: skip
    widths = []
    for level in range(_count(state, r"encoder\.down\.(\d+)\.")):
        block = f"encoder.down.{level}.block.0"
        widths.append(
            size((f"{block}.conv1.weight", 4, 0), (f"{block}.norm2.weight", 1, 0), (f"{block}.conv2.weight", 4, 0))
        )
    sizes = {
        "scales": sides,
        "codebook_size": size((_CODEBOOK, 2, 0), (USAGE_KEY, 2, 1)),
        "code_width": size(
            ("quant_conv.weight", 4, 0), ("post_quant_conv.weight", 4, 0), ("encoder.conv_out.weight", 4, 0),
            ("decoder.conv_in.weight", 4, 1), (_CODEBOOK, 2, 1),
        ),
        "channels": channels,
        "channel_multipliers": [width // channels for width in widths],
        "num_res_blocks": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "num_phi": _count(state, r"quantize\.quant_resi\.(?:qresi_ls\.)?(\d+)\.") or 1,
        "phi_ratio": 0.0,
        "attention": "encoder.mid.attn_1.qkv.weight" in state,
    }  # fmt: skip
    if any(name.startswith(_PHI) for name in state):
        known = _phi_ratio_of(notes, phi_ratio, where)
        default = TokenizerConfig()
        sizes["phi_ratio"] = default.phi_ratio if known is None else known
        if known is None and validate(TokenizerConfig, {**sizes, "scales": default.scales}, where) != default:
            distributed.note_once(
                f"{where}: phi_ratio is not told by a file of other sizes than VAR's; taken as VAR's "
                f"{default.phi_ratio}. Otherwise: Tokenizer.open(FILE, SCALES, phi_ratio=...)"
                ".save_pretrained(DIRECTORY), and give the directory"
            )
    return validate(TokenizerConfig, sizes, where)


def _check_is_vars(state: Mapping[str, Tensor], notes: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raises UserError for what is no VAR tokenizer, and for normalised codes."""
    if _CODEBOOK not in state:
        some = ", ".join(list(state)[:3])
        own = "quantizer.codebook.weight" in state
        raise UserError(
            f"{where}: not a VAR tokenizer: no key {with_match(_CODEBOOK, list(state))} among {some}, ... "
            + (
                "These are weights of mepa_ds: Tokenizer.open and commands take their directory (config.json)"
                if own
                else f"Expected a state dict such as vae_ch160v4096z32.pth{but_another(state)}"
            )
        )
    if setting_in(notes, "using_znorm", bool):
        raise UserError(f"{where}: trained with using_znorm (normalised codes), which cannot be computed here")


def _scales_of(state: Mapping[str, Tensor], notes: Sequence[Mapping[str, Any]], where: str) -> Sequence[int]:
    """The scales of the settings, or VAR's ten. Raises UserError for weights that were made for another number."""
    scales, default = schedule_in(notes), TokenizerConfig().scales
    if scales is not None:
        return scales
    usage = state.get(USAGE_KEY)
    if usage is not None and len(usage) != len(default):
        raise UserError(
            f"{where}: made for {len(usage)} scales, not for VAR's {len(default)}: "
            "say which, as in scales=(1, 2, 3, 4) or --scales 1 2 3 4"
        )
    return default


def _phi_ratio_of(notes: Sequence[Mapping[str, Any]], given: float | None, where: str) -> float | None:
    """The ratio of the settings, or the one that was given. Raises UserError when the two differ."""
    known = setting_in(notes, "quant_resi", float)
    if given is not None and known is not None and given != known:
        raise UserError(f"phi_ratio: {where} was trained with {known}, and has no other; got {given}")
    return given if known is None else known


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest index that the pattern's group finds."""
    found = (re.match(pattern, name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)
