"""The words of a run's report: what the stored rounds and evaluations show, and what they do not."""
