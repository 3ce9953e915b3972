"""`mepa evaluate-tokenizer`: how well a tokenizer reconstructs held-out images, in numbers and in a picture."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from mepa_ds import distributed, log
from mepa_ds.command_line import entry
from mepa_ds.command_line.remote import RemoteSchemes
from mepa_ds.command_line.scales import Scales
from mepa_ds.command_line.tables import aligned
from mepa_ds.errors import UserError
from mepa_ds.files import check_writable, naming_full_disks, naming_full_gpus, write_json
from mepa_ds.progress import Progress


@dataclass
class EvaluateTokenizerOptions:
    """Encodes and decodes held-out images: PSNR, SSIM, LPIPS, Frechet distances (rFID), and the use of the codebook.

    Writes scores.json and reconstructions.png: originals, and what is decoded of the token maps up to each scale. A GPU
    is used where there is one.
    """

    tokenizer: tyro.conf.Positional[Path]
    """Directory of the tokenizer, or VAR's vae_ch160v4096z32.pth."""
    shards: tyro.conf.Positional[Path]
    """Held-out images: a shard set. They are cropped as in training (shorter side to 1.125 x, then the centre)."""
    out: Path = Path("tokenizer_scores")
    """Directory of the results."""
    features: tuple[str, ...] = ()
    """Spaces of Frechet distances: inception (rFID), teacher:NAME[:WEIGHTS], patch-pca:DIR, classifier:DIR."""
    inception: Path | None = None
    """torch-fidelity's weights-inception-2015-12-05-6726825d.pth, for the space inception."""
    lpips: Path | None = None
    """torchvision's weights of the network of LPIPS; without, no LPIPS."""
    lpips_network: Literal["vgg", "alex"] = "vgg"
    """The network of LPIPS: VGG-16, as in tokenizers' papers, or AlexNet."""
    max_images: int | None = None
    """So many images, evenly over the set, which may be sorted by class; all if not given."""
    batch_size: int = 32
    """Images at a time."""
    shown: int = 8
    """Images in the picture."""
    scales: Scales = None
    """Sides of the token maps, for a tokenizer that is to be used with others than its own."""
    remote_schemes: RemoteSchemes = ()


def main(argv: list[str]) -> None:
    options = tyro.cli(EvaluateTokenizerOptions, prog="mepa evaluate-tokenizer", args=argv)
    for name in ("max_images", "batch_size", "shown"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    log.make_stdout_a_log()
    from mepa_ds.data.images import evenly, images_once
    from mepa_ds.data.remote.schemes import allow
    from mepa_ds.data.shard_set import ShardSet
    from mepa_ds.evaluation.feature_spaces import open_feature_spaces
    from mepa_ds.evaluation.tokenizer.scores import score_tokenizer, tokenizer_sheet
    from mepa_ds.images.pictures import save_png
    from mepa_ds.tokenizer.perceptual import load_lpips
    from mepa_ds.tokenizer.tokenizer import Tokenizer

    allow(options.remote_schemes)
    device = distributed.device_of(distributed.read_launch())
    tokenizer = Tokenizer.open(options.tokenizer, options.scales).to(device)
    there = len(ShardSet(options.shards, "images"))
    count = min(options.max_images or there, there)
    spaces = open_feature_spaces(options.features, device, options.inception)
    lpips = options.lpips and load_lpips(options.lpips_network, options.lpips, "--lpips").to(device)
    check_writable(options.out, "--out")
    side = tokenizer.config.image_side
    # Every n-th image is read, which is what rank 0 of n would read; of them all but `count` are dropped.
    every = distributed.Ranks(0, there // count)
    batches = images_once(options.shards, batch_size=options.batch_size, image_side=side, ranks=every)
    batches = evenly(batches, -(-there // every.world_size), count)
    progress = Progress(total=count, desc="reconstructing", unit="image")
    with progress as bar, naming_full_gpus(options.batch_size):
        found = score_tokenizer(tokenizer, batches, count, spaces, lpips or None, options.shown, bar.update)
    protocol = {
        "tokenizer": {
            "path": str(options.tokenizer),
            "identity": tokenizer.identity,
            "scales": tokenizer.config.scales,
        },
        "shards": str(options.shards),
        "image_side": side,
        "preprocessing": "shorter side to 1.125 x the side, Lanczos, then the centre; images of that side as they are",
        "lpips": options.lpips_network if lpips else None,
        "feature_spaces": found.spaces,
    }
    with naming_full_disks(options.out):
        write_json(options.out / "scores.json", {**found.scores, "notes": found.notes, "protocol": protocol})
        title = f"{options.tokenizer.name}: {_headline(found.scores)}; columns: decoded up to each scale"
        save_png(tokenizer_sheet(tokenizer, found.shown_B3HW, title), options.out / "reconstructions.png")
    log.say("\n".join(_table(found.scores, tokenizer.schedule.sides)))
    for note in found.notes:
        log.say(f"note: {note}")
    log.say(f"{options.out / 'scores.json'}\n{options.out / 'reconstructions.png'}")


def _headline(scores: dict[str, Any]) -> str:
    return f"PSNR {scores['psnr']:.2f} dB on {scores['num_images']} images"


def _table(scores: dict[str, Any], sides: tuple[int, ...]) -> list[str]:
    rows = [["score", "value", "95 % interval"]]
    for name in [name.removesuffix("_error") for name in scores if name.endswith("_error")]:
        low, high = scores[f"{name}_low"], scores[f"{name}_high"]
        rows.append([name, f"{scores[name]:.4f}", f"{low:.4f} to {high:.4f}"])
    codes = [["scale", "codes in use", "perplexity"]]
    by_scale = zip(sides, scores["codebook_use_by_scale"], scores["perplexity_by_scale"], strict=True)
    codes += [[f"{side} x {side}", f"{100 * use:.1f} %", f"{perplexity:.1f}"] for side, use, perplexity in by_scale]
    codes.append(["all", f"{100 * scores['codebook_use']:.1f} %", f"{scores['perplexity']:.1f}"])
    return [f"{scores['num_images']} images", *aligned(rows, left=1), "", *aligned(codes, left=1)]


if __name__ == "__main__":
    entry.run(lambda: main(sys.argv[1:]))
