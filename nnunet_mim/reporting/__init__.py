"""Draws pages and figures from arrays and texts; knows nothing of runs and checkpoints."""
