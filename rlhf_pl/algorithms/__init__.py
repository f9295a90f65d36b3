"""The mathematics: losses, pair selection, reward shaping. Imports torch and the errors alone."""
