"""Packed token shards to batches: order, blend, packing, loading."""
