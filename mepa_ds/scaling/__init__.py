"""Scaling studies: many runs of different sizes, planned together, and the laws that their losses follow."""
