"""Runs a stage and everything missing that it needs, each under its lock, with the spec first and the manifest last."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import click

from nfm.pipeline import prechecks
from nfm.pipeline.artifacts.artifact import (
    SCHEMA,
    Artifact,
    ArtifactError,
    WrongArtifact,
    open_spec,
    publish,
    readable,
    workplace,
)
from nfm.pipeline.artifacts.intact import checked_inputs
from nfm.pipeline.artifacts.lineage import inputs_of
from nfm.pipeline.artifacts.lock import Lock
from nfm.pipeline.console import Console, StopRequest
from nfm.pipeline.graph import Node, manifest_of, optional, upstream
from nfm.stages.base import Reporter, Stopped
from nfm.stages.display.units import clock, figure
from nfm.storage.errors import StorageError, WrongUse
from nfm.storage.files import atomic
from nfm.storage.files.copies import mirror
from nfm.storage.files.paths import exists, is_remote, names_in, remove, remove_below, several
from nfm.storage.ledger.standing import again


class Beside(Protocol):
    """Makes stages that do not wait for each other at once, see side_by_side.py."""

    def finished(self, nodes: Mapping[str, Node], stop: StopRequest) -> Iterator[tuple[Node, bool]]:
        """The nodes of the run when their inputs are finished, and whether each was made just now."""


def run(
    nodes: Mapping[str, Node], target: str, stop: StopRequest | None = None, beside: Beside | None = None
) -> Artifact:
    """Makes `target` and its inputs, inputs first. What is complete is only reported.

    With `beside`, stages that do not wait for each other are made at once.
    """
    stop = stop or StopRequest()
    with stop.listening():
        arrived: dict[str, Artifact] = {}
        with stop.at_once():  # the name of a data set depends on its files, which may take minutes to read
            prechecks.ready(nodes, target)
        order = beside.finished(nodes, stop) if beside else ((node, False) for node in upstream(nodes, target))
        for node, just_made in order:
            arrived[node.name] = bring(node, stop, tell=not just_made)
            if node.name in ("data", "latents"):
                prechecks.ready(nodes, target)
            _check_arrived(nodes[target], node, arrived)
    return arrived[target]


def _check_arrived(target: Node, node: Node, arrived: Mapping[str, Artifact]) -> None:
    """Lets the target refuse an input when it is made, before hours of work on the others."""
    check = getattr(target.stage, "check_arrived", None)
    if check is None:
        return
    ready = {role: arrived[of.name].readable for role, of in target.inputs.items() if of.name in arrived}
    for role in [role for role, of in target.inputs.items() if of.name == node.name]:
        check(role, ready)


def bring(node: Node, stop: StopRequest, tell: bool = True) -> Artifact:
    """The finished artifact of a node; it is made now if it is missing. `tell` says it of one that is not."""
    with stop.at_once():  # its name depends on all source files, which may take minutes to read
        artifact = node.artifact()
    if artifact is None:
        raise ArtifactError(f"{node.name}: an input vanished while the run went on; run it again")
    if artifact.done:
        _standing(artifact, artifact.path.name)  # the folder is named by the fingerprint, which includes the inputs
        if tell:
            click.echo(f"{node.name}: {artifact.name} is up to date ({headline(artifact)})", err=True)
    else:
        artifact = _execute(node, artifact, stop)
    return artifact


def _execute(node: Node, artifact: Artifact, stop: StopRequest) -> Artifact:
    """Runs one stage, from its spec to its manifest."""
    inputs = node.input_artifacts() or {}
    if not is_remote(artifact.path):
        artifact.path.mkdir(parents=True, exist_ok=True)
    with Lock(artifact.path) as lock, never_begun(artifact):
        # Asked again under the lock: the next generation of a store may have another number by now.
        artifact = node.artifact() or artifact
        if artifact.done:
            return artifact
        with stop.at_once():
            paths = checked_inputs(inputs, lambda said: click.echo(f"{node.name}: {said}", err=True))
        resumed = artifact.started
        spec = prepare(node, artifact, inputs)
        out = workplace(artifact.path)
        console = console_of(node.name, artifact, stop, lock)
        started = time.time()
        anew = optional(node.stage, "starts_anew", lambda config: False)(node.config)
        console.say(f"{'making' if not resumed else 'beginning anew' if anew else 'resuming'} {artifact.name}")
        console.log("START", spec=spec["fingerprint"], resumed=resumed, versions=versions())
        try:
            # A stage whose work in hand is worth little need not check for stops.
            abrupt = getattr(node.stage, "STOPS_AT_ONCE", False)
            with stop.at_once() if abrupt else contextlib.nullcontext(), _compiling(console):
                result = node.stage.run(node.config, paths, out, console)
            lock.check()
            if console.stopping:
                raise Stopped
            made = provenance(spec, node.config.model_dump(mode="json"), started)
            body = publish(artifact.path, result, made, lock.check)
        except (Stopped, KeyboardInterrupt):
            lock.check()
            console.log("STOP")
            console.say(f"stopped; the same command {'begins it anew' if anew else 'goes on from here'}")
            raise
        except BaseException as error:
            console.log("FAIL", error=f"{type(error).__name__}: {error}")
            raise
        else:
            console.log("COMPLETE", content_digest=body["content_digest"], metrics=result.metrics)
            _tidy(node, artifact.path, out)
            console.finish()
            console.say(f"done in {clock(time.time() - started)}: {headline(artifact)}")
            return artifact
        finally:
            console.close()


def _tidy(node: Node, *folders: Path) -> None:
    """Removes what only the making of an artifact needs, in the stage's folders `WORKING`.

    Until the manifest is there, a killed run goes on with it. What stays here is left to `nfm gc`.
    """
    for folder in dict.fromkeys(folders):
        for name in getattr(node.stage, "WORKING", ()):
            with contextlib.suppress(OSError, StorageError):
                remove_below(folder / name)


@contextlib.contextmanager
def _compiling(console: Reporter) -> Iterator[None]:
    """A stop that reaches the whole group of processes ends those of torch.compile first, which it then tells."""
    try:
        yield
    except Exception as error:
        if console.stopping and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise Stopped from error
        raise


@contextlib.contextmanager
def never_begun(artifact: Artifact) -> Iterator[None]:
    """If the work turns out to be wrong use, no artifact is left, unless it existed before. Call under its lock."""
    begun = artifact.started
    try:
        yield
    except WrongUse:
        if not begun:
            if is_remote(artifact.path):
                several(
                    artifact.path,
                    remove,
                    [artifact.path / "events" / name for name in names_in(artifact.path / "events")],
                )
                remove(artifact.path / "spec.json")
            shutil.rmtree(mirror.local_folder(artifact.path), ignore_errors=True)
        raise


def prepare(node: Node, artifact: Artifact, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """The `spec.json` of the artifact, written now if it is missing. Removes temporary files of killed writers.

    Call under its lock.
    """
    if not is_remote(workplace(artifact.path)):
        atomic.clear_temporaries(workplace(artifact.path))
    if artifact.started:
        spec = _standing(artifact, node.fingerprint(inputs))
    else:
        spec = open_spec(artifact.path, specification(node, inputs))
    mirror.prepare(artifact.path)
    return spec


def _standing(artifact: Artifact, fingerprint: str) -> dict[str, Any]:
    """The existing `spec.json`. Raises if it is damaged, or if its fingerprint does not fit the folder."""
    if not artifact.started:
        raise ArtifactError(
            f"{artifact.path / 'spec.json'}: missing, and {artifact.manifest_name} stands beside it; restore it from a "
            "copy, or remove the folder and run the stage again"
        )
    spec = artifact.spec
    if not str(spec.get("fingerprint")).startswith(fingerprint):
        raise ArtifactError(f"{artifact.path / 'spec.json'} holds another fingerprint; move that folder away")
    return spec


def provenance(spec: Mapping[str, Any], config: dict[str, Any], started: float) -> dict[str, Any]:
    """What a manifest says about how it was made: inputs, the whole config, code, versions and times."""
    finished = time.time()
    return {
        **{key: spec[key] for key in ("stage", "version", "fingerprint", "inputs")},
        "config": config,
        "versions": versions(),
        "git_commit": git_commit(),
        "started": _timestamp(started),
        "finished": _timestamp(finished),
        "seconds": round(finished - started, 3),
    }


def seal_store(artifact: Artifact) -> Artifact:
    """Seals the complete draws of a store, for example after a stop. Returns the newest seal if nothing is new."""
    from nfm.stages.pairs import stage
    from nfm.stages.stores import repair

    spec = artifact.spec
    if "store" not in spec:
        raise WrongArtifact(f"{artifact.name} is no pair store; only stores are sealed")
    if "exported" in spec:
        raise WrongArtifact(f"{artifact.name} is an exported store, which its export seals: {again(artifact.path)}")
    if spec.get("stage") != stage.NAME:  # made without the pipeline
        with Lock(artifact.path):
            return Artifact(artifact.path, repair.seal_complete(artifact.path))
    stop = StopRequest()
    with Lock(artifact.path) as lock, stop.listening():
        inputs = readable({role: found for role, found in inputs_of(artifact).items() if found.done})
        console = console_of(stage.NAME, artifact, stop, lock)
        try:
            result = stage.seal(artifact.path, *repair.sealable(artifact.path), inputs, console)
        finally:
            console.close()
        lock.check()
        if not exists(artifact.path / result.manifest):
            publish(artifact.path, result, provenance(artifact.spec, artifact.spec["config"], time.time()))
    return Artifact(artifact.path, result.manifest)


def specification(node: Node, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """`spec.json`: what decides the result. It is written before the work begins and has no time, host or path."""
    references = {}
    for role, found in inputs.items():
        manifest = manifest_of(found)
        references[role] = {
            "artifact": found.name,
            "manifest": found.manifest_name,
            "content_digest": manifest["content_digest"],
        }
    identity = {"stage": node.stage.NAME, "version": node.stage.VERSION, "config": node.config.semantic()}
    body = {"schema": SCHEMA, **identity, "inputs": references, "external": node.external()}
    describe = getattr(node.stage, "describe", None)
    extra = describe(node.config, readable(inputs)) if describe else {}
    return {**body, **extra, "fingerprint": node.fingerprint(inputs)}


def console_of(name: str, artifact: Artifact, stop: StopRequest, lock: Lock | None = None) -> Console:
    """The reporter of work on an artifact, whose events are beside it; in a bucket they are copies."""
    folder = mirror.local_folder(artifact.path)
    folder.mkdir(parents=True, exist_ok=True)
    copies = artifact.path / "events" if folder != artifact.path else None
    return Console(name, folder / "events", stop, lock, copies=copies)


def headline(artifact: Artifact) -> str:
    """The first figures in a stage's metrics, as one line."""
    metrics = manifest_of(artifact).get("metrics", {})
    plain = [(key, value) for key, value in metrics.items() if isinstance(value, int | float | str)]
    return ", ".join(
        f"{key} {figure(value, 5)}" if isinstance(value, float) else f"{key} {value}" for key, value in plain[:4]
    )


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that compute and write, for the manifest."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("nfm-pairs", "numpy", "torch", "pyarrow", "ray", "pydantic", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_commit() -> str | None:
    """The commit of the running code, with `+` if files differ; None outside a repository."""
    here = Path(__file__).resolve().parent
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        head, changes = (
            subprocess.run(c, cwd=here, capture_output=True, encoding="utf-8", errors="backslashreplace", check=True)
            for c in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
