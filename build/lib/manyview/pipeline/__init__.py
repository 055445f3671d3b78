"""From shard bytes to view tensors: sources, shards, store, plan, views, engines, loader."""
