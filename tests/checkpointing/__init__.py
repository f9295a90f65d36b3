"""Resume points, and runs that go on from those of earlier versions."""
