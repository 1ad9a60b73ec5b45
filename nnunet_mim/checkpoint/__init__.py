"""The checkpoint: the format that pretraining and finetuning share."""
