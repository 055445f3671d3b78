"""Images to shards: what only conversion needs. Training imports none of it."""
