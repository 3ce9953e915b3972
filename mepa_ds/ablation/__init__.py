"""Ablations: the same run with and without each part of the method, several seeds each, and an honest comparison."""
