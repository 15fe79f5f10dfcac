"""The stages of pruning: costs, selection, compensation."""
