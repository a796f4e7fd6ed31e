"""Training: where arrays live, what moves, what is kept, and the loop."""
