"""What a run measures between two steps: held-out tokens, generated images, pictures."""
