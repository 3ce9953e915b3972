"""A study before it runs: its file, its runs, what they cost and what they could tell."""
