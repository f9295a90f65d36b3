"""Tests of the mathematics and of users' algorithms."""
