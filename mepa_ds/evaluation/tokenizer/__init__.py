"""Scores of tokenizers: what of an image is left after it was encoded and decoded."""
