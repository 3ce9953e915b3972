"""How laws are fitted: the objective, its optimum, the bootstrap, and what a result says."""
