"""Studies of whole networks: accuracy, time and memory of every method."""
