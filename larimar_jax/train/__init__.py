"""Training: where arrays live, the step, the loop around it, and its checkpoints."""
