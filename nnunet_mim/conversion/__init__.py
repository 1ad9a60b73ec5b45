"""Importing weights of the published MiM architecture (`mim_convert`)."""
