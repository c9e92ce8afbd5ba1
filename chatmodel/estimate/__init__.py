"""What will a pretraining run take? Said before anything is spent, and compared with what happened afterwards."""
