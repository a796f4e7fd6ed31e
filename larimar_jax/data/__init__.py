"""Texts to pieces to episodes, and the readers of the editing benchmarks."""
