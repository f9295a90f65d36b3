"""Checkpoints, and where a run goes on."""
