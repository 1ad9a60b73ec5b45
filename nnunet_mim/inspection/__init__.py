"""`mim_inspect`: what a checkpoint is, and what its network makes of a CT."""
