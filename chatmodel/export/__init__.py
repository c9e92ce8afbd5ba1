"""How a model gets into other tools and comes from them, and the proof that it is still the same model."""
