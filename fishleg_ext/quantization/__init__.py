"""Quantization: codes for weights, how many bits each group has, packed tensors and their files."""
