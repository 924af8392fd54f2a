"""Where shards are encoded; every executor runs the same `Encoder.encode_shard`, see nfm.stages.encoding.jobs."""
