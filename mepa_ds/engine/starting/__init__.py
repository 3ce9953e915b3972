"""How an engine comes to its weights: made without drawing them twice, and filled from files."""
