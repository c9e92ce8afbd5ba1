"""How does a model learn from rewards? What can be asked, a Trainer's part in a step, micro-batches, results."""
