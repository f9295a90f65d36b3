"""Tests of checkpoints, and of runs resumed from those of earlier versions."""
