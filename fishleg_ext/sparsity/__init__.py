"""Which weights may be pruned, how many, in which pattern, and the masks that hold them at zero."""
