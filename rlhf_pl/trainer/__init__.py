"""The Trainer of a run: what Lightning's lacks, shared by the command line and Python."""
