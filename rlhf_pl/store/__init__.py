"""What a run keeps on disk: its rounds, as files under manifests."""
