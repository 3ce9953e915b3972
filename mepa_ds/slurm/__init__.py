"""Submitting, chaining and watching jobs on a SLURM cluster. The scripts that run there are in slurm/."""
