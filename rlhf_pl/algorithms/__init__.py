"""The mathematics: pure functions and small classes on tensors, free of Lightning, files and models."""
