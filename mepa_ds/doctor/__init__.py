"""A look at the machine, the versions, and the user's files before work begins: `mepa doctor`."""
