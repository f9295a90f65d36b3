"""Resume points: when they are written, and how a run ends beside one."""
