"""How the policy's weights reach the sampler, and the check that they did."""
