"""What half an hour of an accelerator tells: `python -m benchmarks.accelerator`.

It needs torch, numpy, scipy, safetensors and click; nothing here needs pyarrow, pydantic or Ray but the reader's piece,
which says so where they are missing. So it takes from the library what is under nfm.trainers, and arithmetic.
"""
