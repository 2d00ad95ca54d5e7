"""Clips and captions become latents and text embeddings, in fingerprinted Parquet shards."""
