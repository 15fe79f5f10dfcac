"""What `fishleg-ext check` and the tests stand on: hard inputs, and the comparison with float64."""
