"""Vocabularies in parts: shards of ranks, tiles of linear heads."""
