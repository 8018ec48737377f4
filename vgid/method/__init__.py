"""How a model is made to forget: the paper's teacher and losses, the baselines, the loop."""
