"""Cases and crops that a pretraining reads."""
