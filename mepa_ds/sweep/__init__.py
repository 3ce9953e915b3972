"""Sweeps: one recipe trained with many values of its keys, and a table of what came out."""
