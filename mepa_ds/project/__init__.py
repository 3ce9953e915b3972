"""From images to a trained model: look at them, choose, write recipes and commands, run all of it stage by stage."""
