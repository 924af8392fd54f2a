"""The audit: follows the lineage back to the data and checks that every artifact is what its manifest says.

It only reads. Level `quick` recomputes fingerprints and digests of manifests and checks sizes. `default` hashes every
file and checks the keys of the pairs against their source. `deep` encodes a seeded sample of pairs again with the
teacher and decodes it. Artifacts may come from anybody. So no code that a store names is run unless the user allows it,
and outside the root receipts are written only beside artifacts that the user named.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nfm.pipeline.artifacts import intact
from nfm.pipeline.artifacts.artifact import Artifact, ArtifactError, fingerprint, readable, under_root
from nfm.pipeline.artifacts.lineage import ancestors, inputs_of, references
from nfm.pipeline.builder import build
from nfm.pipeline.config import RunConfig
from nfm.pipeline.graph import STAGES, Node
from nfm.stages.base import Finding, StageError
from nfm.stages.couplings import custom
from nfm.stages.data.latents import audit as latents_audit
from nfm.stages.data.latents import stage as latents
from nfm.stages.display import units
from nfm.stages.pairs import stage as pairs
from nfm.stages.stores import audit as store_audit
from nfm.stages.trained import student, teacher
from nfm.stages.trained.training.checkpoints import CHECKPOINTS
from nfm.storage.errors import StorageError
from nfm.storage.files import atomic
from nfm.storage.files.parallel import parallel
from nfm.storage.files.paths import inside, is_remote, names_in
from nfm.storage.ledger.standing import UNSEALED, again, unsealed

Level = Literal["quick", "default", "deep"]


@dataclass(frozen=True)
class Audited:
    """The result for one artifact: what was checked, what was found, and statements of confidence."""

    artifact: str
    manifest: str
    files: int
    bytes: int
    findings: list[Finding]
    statements: list[str]
    seconds: float


def audit(
    targets: Sequence[Artifact],
    level: Level = "default",
    deep_sample: int = 300,
    allowed: custom.Allowed = custom.NOBODYS,
) -> list[Audited]:
    """Audits these artifacts and all their ancestors, inputs first, each once. A receipt is kept beside each.

    `allowed` are the custom functions that `deep` may run.
    """
    unique = {str(found.reference): found for target in targets for found in ancestors(target)}
    results: list[Audited] = []
    for found in unique.values():
        damaged = {result.artifact for result in results if result.findings}
        results.append(_audit_one(found, level, deep_sample, allowed, damaged))
        if found.path in {target.path for target in targets} or under_root(found.path):
            _keep_receipt(found.path, results[-1], level)
    return results


def own_code(config: RunConfig) -> frozenset[str]:
    """The digests of the custom functions that a run's own config names, of their files as they are now."""
    nodes = [node for node in build(config).values() if node.stage in (latents, pairs, student, teacher)]
    return frozenset(digest for node in nodes for digest in node.external().values())


def finished(config: RunConfig) -> list[Artifact]:
    """Every finished artifact of a run, in the order of the pipeline."""
    done = [artifact for node in build(config).values() for artifact in _manifests_of(node) if artifact.done]
    if not done:
        raise ArtifactError("nothing of this config is made yet; start with `nfm run pairs -c F`")
    return done


def _manifests_of(node: Node) -> list[Artifact]:
    """The artifact of a node. If its own manifest is unreadable, all in its folder, including damaged ones."""
    try:
        found = node.artifact()
        return [found] if found is not None else []
    except (StorageError, ArtifactError):
        pass
    if (folder := node.readable_folder()) is None:
        return []
    return [Artifact(folder, name) for name in names_in(folder) if re.fullmatch(r"manifest.*\.json", name)]


def as_text(results: Sequence[Audited]) -> str:
    """The results as a table."""
    lines = []
    for result in results:
        verdict = units.number_of(len(result.findings), "FINDING").upper() if result.findings else "clean"
        looked = (
            f"{units.number_of(result.files, 'file')}, {units.size(result.bytes)}"
            if result.files
            else "nothing to compare"
        )
        lines.append(f"{result.artifact:24} {verdict:12} {looked:24} {result.seconds:6.1f} s  {result.manifest}")
        lines += [
            f"    {finding.file}: {_sentence(finding.problem)} Remedy: {finding.remedy}" for finding in result.findings
        ]
        lines += [f"    {statement}" for statement in result.statements]
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return text if text.endswith(("?", ".")) else f"{text}."


def _audit_one(
    artifact: Artifact, level: Level, deep_sample: int, allowed: custom.Allowed, damaged: Collection[str]
) -> Audited:
    """What is found of one artifact. It is not judged by inputs that are `damaged` themselves, given by name."""
    started = time.monotonic()
    findings: list[Finding] = []
    statements: list[str] = []
    files, size = 0, 0
    try:
        spec, body = artifact.spec, artifact.manifest()
        files, size = _extent(body)
        if "stage" in spec:  # otherwise the store was made without the pipeline: it has files but no identity
            findings += _check_identity(artifact, spec, body)
        listed = body.get("files", [])
        if states := _left_out(artifact.path, listed):
            listed = [file for file in listed if file not in states]
            statements.append("its state of training was left out, which nothing that is finished needs")
        findings += _check_files(artifact.path, listed, hashed=level != "quick")
        stage = STAGES[spec.get("stage", pairs.NAME)]
        done = {role: found for role, found in inputs_of(artifact).items() if found.done}
        inputs: dict[str, Path] = {}
        if stage in (pairs, latents) and level != "quick":
            if bad := [found.name for found in done.values() if found.name in damaged]:
                statements.append(f"not compared with {', '.join(bad)}: mend the findings there, and audit again")
            else:
                inputs = readable(done)  # brings those of a bucket here, which fails where they are damaged
        if stage is pairs:
            more, said = store_audit.audit(inputs, artifact.reference, level, deep_sample, allowed)
            findings, statements = findings + more, statements + said
        elif inputs and not findings:
            more, said = latents_audit.audit(inputs, artifact.readable, level, deep_sample, allowed)
            findings, statements = findings + more, statements + said
    except (StorageError, ArtifactError, StageError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        findings.append(_unreadable(artifact, error))
    return Audited(
        artifact.name, artifact.manifest_name, files, size, findings, statements,
        round(time.monotonic() - started, 3),
    )  # fmt: skip


def _left_out(folder: Path, files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The files of a training's last state, where whoever copied the artifact left out all of them."""
    states = [file for file in files if not file["payload"] and file["path"].startswith(f"{CHECKPOINTS}/")]
    return states if states and not names_in(folder / CHECKPOINTS) else []


def _unreadable(artifact: Artifact, error: Exception) -> Finding:
    """The finding of an artifact that could not be looked at to the end. A file that the error names is named once."""
    if artifact.started and not artifact.done:
        if artifact.of_store:
            return Finding(str(artifact.path), UNSEALED, unsealed(artifact.path))
        return Finding(str(artifact.path), f"not finished: it has no {artifact.manifest_name}", "run its stage again")
    where, _, problem = str(error).partition(": ")
    if not problem or not where.startswith(str(artifact.path)):
        where, problem = str(artifact.path), str(error) or type(error).__name__
    remedy = "restore it, or make it again: remove the folder and run its stage"
    if artifact.of_store:
        remedy = f"restore it from a copy; or `nfm repair` it, and then {again(artifact.path)}"
    return Finding(where, problem.rstrip("."), remedy)


def _extent(body: dict[str, Any]) -> tuple[int, int]:
    """(files, bytes) that a manifest covers. A large store lists its shards in another file and states their totals."""
    files = body.get("files", [])
    shards = body.get("shards", [])
    listed = [*files, *shards] if isinstance(shards, list) else files
    count, size = len(listed), sum(file["bytes"] for file in listed)
    return (count, size) if isinstance(shards, list) else (count + body["shard_count"], size + body["bytes"])


def _check_identity(artifact: Artifact, spec: dict[str, Any], body: dict[str, Any]) -> list[Finding]:
    """Recomputes the fingerprint and the content digest, and checks that the inputs are still those that were read."""
    findings = []
    path, again = (
        str(artifact.path / artifact.manifest_name),
        "make the artifact again: remove its folder, run its stage",
    )
    contents = {role: reference.content_digest for role, reference in references(artifact).items()}
    lacking = [name for name in ("fingerprint", "config", "files") if name not in body]
    if lacking and spec["stage"] == pairs.NAME:
        return [Finding(path, f"{pairs.NOT_OURS}: it has no {', no '.join(lacking)}", pairs.NOT_OURS_REMEDY)]
    key = fingerprint(spec["stage"], spec["version"], spec["config"], {**contents, **spec["external"]})
    # Under the root a folder is named by its fingerprint. A store elsewhere may have any name.
    placed = artifact.path.name == key[:12] or Path(artifact.name).is_absolute()
    if not (key == spec["fingerprint"] == body["fingerprint"] and placed):
        findings.append(Finding(path, "the fingerprint is not the one of its spec and folder", again))
    payload = [file["sha256"] for file in body["files"] if file["payload"]]
    if payload and atomic.content_digest(payload) != body["content_digest"]:
        findings.append(Finding(path, "the content digest is not the one of its payload files", again))
    for role, found in inputs_of(artifact).items():
        if not found.done:
            problem = f"input {role}, {found.name}/{found.manifest_name}, is missing"
            findings.append(Finding(path, problem, "restore that artifact or run its stage again"))
        elif _content(found) != contents[role]:
            problem = f"input {role}, {found.name}, holds other content than was read"
            findings.append(
                Finding(path, problem, f"restore {found.name}; what was made from it cannot be vouched for")
            )
    return findings


def _content(artifact: Artifact) -> str | None:
    """The content digest in a manifest; None if it is unreadable, which its own audit reports."""
    try:
        return artifact.manifest()["content_digest"]
    except (StorageError, ArtifactError, KeyError):
        return None


def _check_files(folder: Path, files: list[dict[str, Any]], hashed: bool) -> list[Finding]:
    """Checks the size, and with `hashed` the SHA-256, of every file that the manifest lists."""
    found = parallel(lambda file: intact.problem(folder, file, hashed), files)
    return [
        Finding(str(folder / file["path"]), wrong, intact.REMEDY)
        for file, wrong in zip(files, found, strict=True)
        if wrong is not None
    ]


def _keep_receipt(folder: Path, result: Audited, level: Level) -> None:
    """Writes a dated receipt beside the artifact. If the folder is read-only, only the receipt is lost."""
    receipt = folder / "audits" / f"{units.stamp()}-{level}.json", {"level": level, **asdict(result)}
    if is_remote(folder):
        if under_root(folder):  # a store of somebody else's bucket is left as it is
            with contextlib.suppress(StorageError):
                atomic.write_json(*receipt)
        return
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return
    try:
        kept = inside(folder, "audits")
    except StorageError:
        return  # a link out of the artifact: nothing is written through it
    if kept.is_dir() or not kept.exists():
        atomic.write_json(*receipt)
