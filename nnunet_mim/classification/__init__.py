"""Disease classification: what a pretrained encoder, a baseline or a new network says about a case or a lesion."""
