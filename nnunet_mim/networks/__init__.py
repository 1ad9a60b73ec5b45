"""The networks that are pretrained, and the segmentation network that finetuning trains."""
