"""What the JSON of a benchmark says of itself: its command, and the versions that ran."""

from __future__ import annotations

import importlib.metadata
import shlex
import sys

from nfm.stages.trained.devices.machine import machine

__all__ = ["command", "machine", "versions"]


def command(module: str) -> str:
    """The command without where it wrote, for whoever repeats it elsewhere. A scratch folder is called SCRATCH."""
    from nfm.storage.errors.masked import masked

    kept: list[str] = []
    left = iter(sys.argv[1:])
    for argument in left:
        if argument in ("--folder", "-o", "--out", "--output"):
            next(left, None)
        elif argument == "--work":
            next(left, None)
            kept += [argument, "SCRATCH"]
        elif argument.startswith("--work="):
            kept.append("--work=SCRATCH")
        elif not argument.startswith(("--folder=", "--out=", "--output=")):
            kept.append(argument)
    return masked(shlex.join(["python", "-m", module, *kept]))


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of these packages."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
