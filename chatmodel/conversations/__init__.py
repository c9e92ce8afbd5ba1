"""What the model learns to answer: data sets and generated tasks as messages, rendered to ids, mixed for training."""
