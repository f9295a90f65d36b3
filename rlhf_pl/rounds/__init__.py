"""A round: its stages, its policy and its metrics."""
