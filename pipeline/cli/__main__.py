"""`python -m nfm.pipeline.cli` is `nfm`, for environments whose scripts are not on the path."""

from nfm.pipeline.cli import main

main()
