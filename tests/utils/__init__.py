"""Tests of the utilities that all other packages use."""
