"""Models: how they load, what they compute, how prompts share a row."""
