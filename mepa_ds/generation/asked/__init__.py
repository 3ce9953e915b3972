"""What `mepa sample` is asked: its options, and what they come to for the sampler."""
