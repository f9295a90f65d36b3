"""Trials behind the defaults: short runs of REBEL over tasks, models and settings. See docs/tuning.md."""
