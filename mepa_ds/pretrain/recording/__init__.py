"""The records of steps: the report of one step, means over several steps, and detectors of problems."""
