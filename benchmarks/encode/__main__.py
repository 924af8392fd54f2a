from benchmarks.encode.command import encode
from nfm.pipeline.cli.exits import run

run(encode)
