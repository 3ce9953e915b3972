"""The formulas of scores: NumPy arrays or tensors in, floats out. Nothing here knows of images or networks."""
