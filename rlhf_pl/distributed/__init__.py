"""Several processes: what they share, strategies, weights across ranks, failures."""
