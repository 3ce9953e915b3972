"""Checkpoints that do not depend on the number of ranks that wrote them. This package needs no DeepSpeed.

store             writes and reads tensors, in pieces that any number of ranks can read
state             holds the state of a run besides its tensors
files             names, lists, verifies, publishes and prunes the directories of checkpoints
weights           exports the weights of checkpoints, and finds exported weights
compare           lists the differences between two checkpoints
background_writer writes while training continues
progress          passes on that a long write or read makes progress
"""
