"""Getting data and plans ready for pretraining and finetuning."""
