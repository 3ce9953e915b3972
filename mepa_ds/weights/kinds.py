"""What foreign weights are, by their names: for messages about files that were given in another's place."""

from __future__ import annotations

from collections.abc import Iterable

_KINDS = {
    "quantize.embedding.weight": "VAR's tokenizer",
    "lvl_embed.weight": "VAR's transformer",
    "quantizer.codebook.weight": "a tokenizer of mepa_ds",
    "position_embed": "a transformer of mepa_ds",
    "patch_embed.proj.weight": "a ViT, such as a teacher's",
    "embeddings.patch_embeddings.projection.weight": "a ViT of the transformers library",
    "embeddings.patch_embeddings.weight": "a ViT of the transformers library",
    "Conv2d_1a_3x3.conv.weight": "an Inception network",
    "lin0.model.1.weight": "LPIPS",
}
"""A name that weights of a kind have -> the kind."""


def kind_of(names: Iterable[str]) -> str | None:
    """What the weights of these names are of, also behind a prefix. None: unknown."""
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            if kind := _KINDS.get(".".join(parts[start:])):
                return kind
    return None


def but_another(names: Iterable[str]) -> str:
    """The words that a message about missing names ends with."""
    kind = kind_of(names)
    return f". These are weights of {kind}" if kind else ""
