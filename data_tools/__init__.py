"""From raw text to packed token shards, with a manifest that proves what came out."""
