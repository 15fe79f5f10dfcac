"""What a network says of itself: per-sample gradients, layer inputs and output gradients, read from data."""
