"""Pictures of what a model does, with the data beside them: `mepa inspect`.

subject         what is inspected: a run, a checkpoint or weights, with its tokenizer and data
tracing         the routers' choices and hidden states for samples or for held-out images
scales          how an image comes about, scale by scale
routing         which expert each position chose
training_load   the experts' load and the routers' entropy over a run
specialisation  what experts have to do with classes
guidance        how hidden states agree with the teacher
sweep           guidance weight by top-k
"""
