"""Data: shapes and LLaVA files -> Parquet store -> batches; image collections -> image store."""
