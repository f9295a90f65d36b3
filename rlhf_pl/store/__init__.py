"""The rounds of a run on disk: Parquet files and manifests."""
