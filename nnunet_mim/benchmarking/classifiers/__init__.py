"""Experiments with mim_classify: classifiers that differ in one thing, with few labels and with all."""
