"""Long trials of what a run survives: `python -m tests.soak.NAME`; docs/reliability.md has their figures."""
