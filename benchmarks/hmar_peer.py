"""Our Markovian model against HMAR's own code, in both layouts of its weights (docs/decisions.md, HMAR's attention).

    python benchmarks/hmar_peer.py CLONE --json FILE    # CLONE: a clone of NVlabs/HMAR

Random weights of depth 2 on a CPU. Parts of HMAR that need a GPU or further packages have stand-ins: its sparse
attention is then a mask, by its own code.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from mepa_ds import log
from mepa_ds.command_line import entry
from mepa_ds.files import write_json
from mepa_ds.generation.sampling import sample
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer import Tokenizer

_SCALES, _CLASSES, _CODES, _WIDTH = (1, 2, 3, 4), 10, 64, 8


@dataclass(frozen=True)
class Options:
    """Compare with HMAR's code."""

    clone: Annotated[Path, tyro.conf.Positional]
    """A clone of NVlabs/HMAR."""
    json: Path | None = None
    """Write the numbers here."""


def main(argv: list[str]) -> None:
    options = tyro.cli(Options, args=argv)
    _import_from(options.clone)
    torch.manual_seed(0)
    make_tokenizer = importlib.import_module("models.vqvae").VQVAE
    theirs = make_tokenizer(_CODES, _WIDTH, ch=32, test_mode=True, share_quant_resi=4, v_patch_nums=_SCALES).eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        found = _compare(theirs, Path(folder))
    for name, value in found.items():
        log.say(f"{name}: largest difference {value:.1e}")
    if options.json is not None:
        write_json(options.json, found)


def _import_from(clone: Path) -> None:
    sys.path.insert(0, str(clone))
    kernels = types.ModuleType("attn.block_sparse_attn_interface")
    kernels.BlockSparseAttention = lambda *sizes: None  # type: ignore[attr-defined]
    misc = types.ModuleType("utils.misc")
    misc.does_not_contain_substrings = lambda name, parts: not any(part in name for part in parts)  # type: ignore[attr-defined]
    sys.modules |= {"attn": types.ModuleType("attn"), kernels.__name__: kernels, misc.__name__: misc}
    importlib.import_module("dist").get_device = lambda: "cpu"  # type: ignore[attr-defined]


def _compare(tokenizer: Any, folder: Path) -> dict[str, float]:
    labels_B, inputs_BLZ = torch.tensor([2, 7]), torch.randn(2, sum(s * s for s in _SCALES) - 1, _WIDTH)
    sizes = {"num_classes": _CLASSES, "depth": 2, "embed_dim": 128, "num_heads": 2, "patch_nums": _SCALES}
    sizes |= {"attn_l2_norm": True, "flash_if_available": False, "fused_if_available": False}
    pretrained = _drawn(importlib.import_module("models.nsp").NextScalePrediction(tokenizer, **sizes))
    published = _drawn(importlib.import_module("models.hmar").HMAR(tokenizer, n_layers_train=1, **sizes))
    torch.save({"trainer": {"transformer_wo_ddp": pretrained.state_dict()}}, folder / "training.pth")
    torch.save(published.state_dict(), folder / "published.pth")
    torch.save(tokenizer.state_dict(), folder / "tokenizer.pth")
    of_training, of_published = (NextScaleTransformer.open(folder / name) for name in ("training.pth", "published.pth"))
    theirs = _logits(pretrained, pretrained.word_embed, pretrained.blocks, pretrained.get_logits, labels_B, inputs_BLZ)
    theirs_published = _logits(
        published,
        lambda x: published.word_embed(x) + published.word_embed_bias,
        [*published.base_blocks, *published.ns_blocks],
        published.get_ns_logits,
        labels_B,
        inputs_BLZ,
    )
    images = published.generate(2, labels_B, cfg=1.5, top_k=1, top_p=0.0, mask=False)
    mine = sample(
        of_published, Tokenizer.open(folder / "tokenizer.pth", _SCALES), labels_B, cfg=1.5, top_k=1, top_p=0.0
    )
    pairs = {
        "logits, training": (of_training(labels_B, inputs_BLZ).logits_BLV, theirs),
        "logits, published": (of_published(labels_B, inputs_BLZ).logits_BLV, theirs_published),
        "greedy images, published": (mine, images),
    }
    return {name: float((found - expected).abs().max()) for name, (found, expected) in pairs.items()}


def _drawn(network: Any) -> Any:
    for parameter in network.parameters():
        parameter.normal_(0, 0.1)
    return network.eval()


def _logits(
    network: Any, embed: Callable[[Tensor], Tensor], blocks: Iterable[Any], head: Any, labels_B: Tensor, inputs: Tensor
) -> Tensor:
    """HMAR's forward pass, without its random labels and its autocast on a GPU."""
    class_BC = network.class_emb(labels_B)
    x_BLC = torch.cat([class_BC[:, None] + network.pos_start, embed(inputs)], dim=1)
    x_BLC = x_BLC + network.lvl_embed(network.lvl_1L) + network.pos_1LC
    condition = network.shared_ada_lin(class_BC)
    for block in blocks:
        x_BLC = block(
            x=x_BLC, cond_BD=condition, attn_bias=network.attn_bias_for_masking, using_block_sparse_attn=False
        )
    logits: Tensor = head(x_BLC, class_BC)
    return logits


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
