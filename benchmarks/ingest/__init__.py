"""Images/s a core of the data stage and its sources, beside others' loaders; `python -m benchmarks.ingest`."""
