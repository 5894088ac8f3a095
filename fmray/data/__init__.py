"""Data: generated shapes, LLaVA files -> Parquet store -> batches."""
