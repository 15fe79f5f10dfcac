"""Observes what a network does with data: per-sample gradients, layer inputs and output gradients."""
