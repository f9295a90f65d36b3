"""Tests of the mathematics, and of algorithms from outside."""
