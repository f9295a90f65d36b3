"""Utilities that all other packages use: errors, the terminal, files, secrets."""
