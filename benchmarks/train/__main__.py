from benchmarks.train.command import train
from nfm.pipeline.cli.exits import run

run(train)
