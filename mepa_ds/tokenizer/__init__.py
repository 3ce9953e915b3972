"""Multi-scale residual VQVAE: images to token maps, and back."""

from mepa_ds.tokenizer.quantizer import MultiScaleQuantizer
from mepa_ds.tokenizer.tokenizer import Tokenizer

__all__ = ["MultiScaleQuantizer", "Tokenizer"]
