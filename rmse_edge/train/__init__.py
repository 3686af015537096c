"""Training: recipe, losses of the three stages, the trainer, and the plain GPT that results are compared with."""
