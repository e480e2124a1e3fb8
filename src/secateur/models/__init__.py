"""Models: loading and saving, the decoder families, and checkpoints that the stock classes can't hold."""
