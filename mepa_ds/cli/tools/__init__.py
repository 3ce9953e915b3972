"""Commands that watch runs, look at the machine, complete words, and sweep keys of a recipe."""
