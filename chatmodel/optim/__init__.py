"""How do the weights move? Muon for the matrices, AdamW for the rest, their groups and their schedules."""
