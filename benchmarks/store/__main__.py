from benchmarks.store.command import store
from nfm.pipeline.cli.exits import run

run(store)
