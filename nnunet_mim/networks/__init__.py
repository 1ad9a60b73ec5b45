"""Networks: the hybrid encoder, the decoder of pretraining, and the segmentation network."""
