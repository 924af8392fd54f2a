"""Only small_files.py reads metadata. Any other read of a file needs its reason in the list below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READER = "storage/files/small_files.py"
# Whose files these are, and why a look at what they are is not needed, or is taken there.
ALLOWED = {
    "pipeline/submit/send.py: .read_bytes": "a config, named by the user, who may give a pipe",
    "pipeline/cli/exits.py: os.open": "the null device",
    "pipeline/config.py: .read_bytes": "a config, named by the user, who may give a pipe",
    "pipeline/console/__init__.py: .open": "a log of this process's own, in a folder that was looked at",
    "pipeline/artifacts/lock.py: .read_text": "the kernel's own, under /proc",
    "stages/evaluation/inception.py: np.load": "statistics, named by the user; never unpickled",
    "stages/stores/export.py: np.load": "an array, named by the user; never unpickled",
    "stages/report/evaluation.py: np.load": "of a file that the reader opened; never unpickled",
    "stages/data/sources/digits.py: .read_bytes": "a file of scikit-learn",
    "stages/data/sources/digits.py: np.loadtxt": "bytes that were read already",
    "stages/data/sources/glyphs.py: .read_bytes": "a font of matplotlib",
    "stages/data/reading/decoding.py: Image.open": "a user's own images",
    "stages/data/sources/idx.py: gzip.open": "a user's own data",
    "stages/data/sources/idx.py: open": "a user's own data",
    "stages/data/reading/arrays.py: .open": "a user's own data, or a member of it",
    "stages/data/reading/arrays.py: np.load": "a user's own data; never unpickled",
    "stages/data/reading/arrays.py: zipfile.ZipFile": "a user's own data",
    "stages/data/reading/many_in_one.py: .open": "a user's own data, or a copy that was checked on arrival",
    "stages/data/reading/tar_samples.py: tarfile.open": "a user's own data, header by header; nothing is unpacked",
    "stages/data/parts.py: pq.ParquetFile": "of a file that the reader opened",
    "stages/data/sources/parquet.py: .open": "a user's own data, by many_in_one.py",
    "stages/data/sources/parquet.py: pq.ParquetFile": "of a file that many_in_one.py opened",
    "stages/data/sources/webdataset.py: .open": "a user's own data, by many_in_one.py",
    "stages/data/reading/tree.py: Image.open": "a user's own images",
    "stages/data/source.py: np.memmap": "scratch that was made a line above",
    "stages/data/source.py: open": "scratch that is made there",
    "stages/stores/head.py: Image.open": "a plot of this process's own, from memory",
    "stages/trained/devices/machine.py: .read_text": "the kernel's own, under /proc",
    "stages/trained/foreign/vae.py: shutil.copyfileobj": "weights that the reader opened, to keep a copy",
    "stages/display/watching/tensor_board.py: Image.open": "a grid of this training's own",
    "stages/display/watching/lines.py: .open": "a training's log, to append to it; the reader read it",
    "storage/files/copies/cache.py: open": "a download, to write it",
    "storage/files/copies/cache_folder.py: os.open": "locks in a folder of this user's",
    "storage/files/copies/large.py: .read_bytes": "a file of this process's own, to send it",
    "storage/files/copies/mirror.py: os.open": "a lock in a folder of this user's",
    "storage/files/durable.py: open": "a file, to write it",
    "storage/files/durable.py: os.open": "a folder, to flush it",
    "storage/format/index.py: pq.ParquetFile": "of a file that the reader opened, or its bytes",
    "storage/files/folder.py: os.open": "folders, and files relative to one: looked at there, by the reader's bound",
    "storage/ledger/shard_list.py: pq.ParquetFile": "of bytes that the reader read",
    "storage/verify/files.py: open": "a copy, to write it",
    "storage/verify/row_fields.py: np.load": "payload whose size and digest were checked; never unpickled",
    "storage/layouts/tar_base.py: np.load": "payload, a member of a tar; never unpickled",
    "storage/layouts/tar_base.py: tarfile.open": "payload whose size and digest were checked",
    "storage/layouts/zarr.py: zarr.open_array": "links to payload whose size and digest were checked",
    "trainers/training/checkpoint_folder.py: .read_text": "a training's own state, whose size was looked at",
    "trainers/training/checkpoint_folder.py: .open": "the same, to write it",
    "trainers/training/apart.py: .open": "a checkpoint that this training's own processes write and read",
    "trainers/training/checkpoint_folder.py: os.open": "files and folders, to flush them",
    "trainers/models/published.py: torch.load": "weights, named by the user; weights only",
    "trainers/models/inception.py: torch.load": "weights, named by the user; weights only",
}
METHODS = {"read_text", "read_bytes", "open"}
OF_MODULES = {
    "np": {"load", "loadtxt", "genfromtxt", "fromfile", "memmap"},
    "numpy": {"load", "loadtxt", "genfromtxt", "fromfile", "memmap"},
    "os": {"open"},
    "io": {"open", "FileIO"},
    "json": {"load"},
    "tomllib": {"load"},
    "torch": {"load"},
    "pq": {"ParquetFile", "read_table", "read_metadata", "read_schema"},
    "pa": {"memory_map", "OSFile"},
    "zipfile": {"ZipFile"},
    "safetensors": {"safe_open"},
    "shutil": {"copyfileobj"},
    "pickle": {"load", "loads", "Unpickler"},
    "joblib": {"load"},
    "mmap": set(),  # of a handle, which somebody opened
}
OURS = {"PairStore", "ImageDataset", "RowField", "cls"}  # whose `open` opens by the reader


def raw_reads(file: Path) -> Iterator[str]:
    """The calls in a file that open or read a file of this machine."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in ("open", "safe_open", "ParquetFile"):
            yield called.id
        if isinstance(called, ast.Attribute):
            owner = called.value.id if isinstance(called.value, ast.Name) else ""
            if called.attr in OF_MODULES.get(owner, ()) or (called.attr.startswith("open") and owner in _LIBRARIES):
                yield f"{owner}.{called.attr}"
            elif called.attr in METHODS and owner not in OURS | {"small_files", *OF_MODULES, *_LIBRARIES}:
                yield f".{called.attr}"


_LIBRARIES = {"tarfile", "zarr", "gzip", "bz2", "lzma", "Image"}


def library() -> list[Path]:
    """All of its files; the benchmarks, which read what they have written, are no part of it."""
    return [path for folder in ("pipeline", "stages", "storage", "trainers") for path in (ROOT / folder).rglob("*.py")]


def test_nothing_reads_a_file_past_the_one_reader() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {call}"
        for path in library()
        if str(path.relative_to(ROOT)) != READER
        for call in raw_reads(path)
    }
    unknown, gone = sorted(found - set(ALLOWED)), sorted(set(ALLOWED) - found)
    assert not unknown, f"read it by nfm.{READER[:-3].replace('/', '.')}, or say here why not: {unknown}"
    assert not gone, f"no longer there, strike them: {gone}"


@pytest.mark.parametrize(
    "line",
    [
        "open(path)",
        "path.read_text()",
        "(folder / 'spec.json').read_bytes()",
        "path.open('rb')",
        "json.load(file)",
        "os.open(path, 0)",
        "np.load(path)",
        "pq.read_table(path)",
        "pickle.load(file)",
        "zarr.open_group(path)",
        "torch.load(path)",
    ],
)
def test_a_raw_read_is_seen(line: str, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(f"def f():\n    return {line}\n")
    assert list(raw_reads(tmp_path / "one.py"))


def test_nothing_is_unpickled_and_nothing_imports_by_a_name_that_a_file_gives() -> None:
    """`allow_pickle` and `weights_only` are said at each call; code is run by stages/couplings/custom.py alone."""
    for path in library():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            said = {word.arg: ast.unparse(word.value) for word in node.keywords}
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            if name == "np.load":
                assert said.get("allow_pickle") == "False", where
            if name == "torch.load":
                assert said.get("weights_only") == "True", where
            assert name not in ("pickle.load", "pickle.loads", "eval", "__import__"), where
            if name == "importlib.import_module":  # of names in a table of this library
                assert path == ROOT / "stages/base.py", where
            if name in ("exec", "importlib.util.spec_from_file_location"):
                assert path == ROOT / "stages/couplings/custom.py", where
            if name == "importlib.util.find_spec" or name == "find_spec":
                # Of a fixed top name it imports nothing.
                assert isinstance(node.args[0], ast.Constant), where
