"""Checkpoints: writing, reading and checking them, and where a run resumes."""
