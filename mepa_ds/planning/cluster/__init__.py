"""A run on a cluster that is not there: the time of a step by its parts, at any number of ranks."""
