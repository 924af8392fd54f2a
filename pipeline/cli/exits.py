"""How a command ends. Exit codes: 0 done, 1 findings or failed work, 2 wrong use, 130 stopped by the user."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import click

from nfm.stages.base import StageError, Stopped
from nfm.stages.trained.devices import launched
from nfm.storage.errors import Told, Unusual, WrongUse
from nfm.storage.errors.masked import masked
from nfm.storage.files import places

# Packages that the base install lacks, by the extra that installs them.
EXTRAS = {
    **dict.fromkeys(("torch", "scipy", "sklearn", "PIL", "safetensors", "torchdiffeq", "tqdm", "webdataset"), "train"),
    **dict.fromkeys(("zarr", "numcodecs"), "zarr"),
    "ray": "ray",
    "matplotlib": "report",
    "torch_fidelity": "fid",
    "diffusers": "latents",
    **dict.fromkeys(("tensorboard", "wandb"), "watch"),
}


def run(command: click.Command) -> None:
    """Runs a command. Errors that a user can act on become one message and an exit code."""
    # By default, idle OpenMP threads spin so long that two processes on the same cores slow each other down (by a
    # factor of 5 to 15 measured on 2 cores). With a short spin, a single process keeps its speed.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    for stream in (sys.stdout, sys.stderr):  # escape what the output's encoding cannot show, instead of an error
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a pipe that was opened for seeking
                stream.reconfigure(errors="backslashreplace")
    try:
        with launched.following() as follows:  # a process of torchrun that is not the first one
            if not follows:
                with _warnings_in_one_line():
                    command(standalone_mode=False)
    except click.ClickException as error:
        text = io.StringIO()  # may repeat an argument
        error.show(file=text)
        click.echo(masked(text.getvalue()), err=True, nl=False)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt, Stopped):
        sys.exit(130)
    except WrongUse as error:
        _fail(error, 2)
    except Told as error:
        _fail(error, 1)
    except OSError as error:
        if error.filename is None and _output_fails():
            _fail(StageError(f"standard output: {error.strerror}; what was made stays, send the text elsewhere"), 1)
        what = f"{error.filename or 'file'}: {error.strerror or error}{places.led_to(error.filename)}"
        _fail(StageError(f"{what}; mend that and run the same command again, what is committed stays"), 1)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
            _fail(StageError(f"{error.name} is not installed here: pip install 'nfm-pairs[{extra}]' brings it"), 1)
        # A fault of ours: shown as Python would, but without secrets.
        click.echo(masked(traceback.format_exc()), err=True, nl=False)
        sys.exit(1)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Says our own warnings as errors are said; Python adds a line of code, which is none of the user's."""
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, Unusual):
            click.echo(f"nfm: {masked(str(message))}", err=True)
        else:
            others(message, category, *where)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = others


def _output_fails() -> bool:
    """Whether standard output cannot be written. It is then closed, otherwise Python would report the error again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _fail(error: Exception, code: int) -> None:
    click.echo(f"nfm: {error}", err=True)
    sys.exit(code)
