"""Models for others: an exported directory with a model card, and its way to a hub."""
