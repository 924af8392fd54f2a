"""Local copies of what is in a bucket: shards for readers, whole artifacts for stages."""
