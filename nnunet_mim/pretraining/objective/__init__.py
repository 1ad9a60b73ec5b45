"""Views, masks and losses: what a pretraining step computes."""
