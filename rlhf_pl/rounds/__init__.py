"""One round: its stages, its policy, its metrics."""
