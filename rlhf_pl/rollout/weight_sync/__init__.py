"""Syncs the policy's weights to the sampler, and checks the result."""
