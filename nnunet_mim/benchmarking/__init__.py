"""Experiments with nnU-Net's own commands: trainings that differ in one thing, and what comes out of them."""
