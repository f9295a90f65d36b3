"""The round store: what every round produced, and what it was made from."""
