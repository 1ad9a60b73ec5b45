"""Measurements of a run on held-out cases, and what they say."""
