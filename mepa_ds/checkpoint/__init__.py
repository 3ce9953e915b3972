"""Checkpoints that do not know how many ranks wrote them. Needs no DeepSpeed.

store             tensors to and from disk, in pieces that any number of ranks can read
state             what a run is besides tensors
files             a checkpoint's directory: named, listed, verified, published, pruned
weights           exported weights, and checkpoints turned into them
compare           what differs between two checkpoints
background_writer writes while training goes on
progress          one place to say that a long write or read goes on
"""
