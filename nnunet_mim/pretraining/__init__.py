"""Self-supervised pretraining by Mask in Mask on nnU-Net-preprocessed CT."""
