"""How is a model trained on conversations? Their rows, the loss on them, a Trainer's part in it, measurements."""
