"""Models: loading, computation, and prompts that are shared between responses."""
