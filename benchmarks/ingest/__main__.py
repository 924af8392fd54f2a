from benchmarks.ingest.command import ingest
from nfm.pipeline.cli.exits import run

run(ingest)
