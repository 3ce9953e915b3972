"""Weights of one model as a start for another one: other classes, other scales, experts."""
