"""A study at work: its runs on this machine, how each is doing, and the table of what they measured."""
