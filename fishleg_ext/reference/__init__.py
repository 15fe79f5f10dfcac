"""Every op in eager PyTorch: the specification, and what runs where no kernel does."""
