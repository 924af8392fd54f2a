"""Stock WebDataset and stock Zarr read a store without any code of ours."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nfm.storage import PairStore

READERS = {"stock_webdataset": "blocks", "stock_webdataset_samples": "samples", "stock_zarr": "zarr"}


@pytest.fixture(params=READERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("draw", [0, 1])
def test_a_stock_reader_sees_every_pair_of_a_draw_in_its_order(
    name: str, draw: int, example: Callable[[str], ModuleType], store: Callable[[str], Path]
) -> None:
    root = store(READERS[name])
    found = [
        tuple(np.asarray(part) for part in parts)  # a pair, or a block of pairs
        for parts in example(name).pairs(str(root), draw)
    ]
    join = np.stack if name == "stock_webdataset_samples" else np.concatenate
    opened = PairStore.open(root)
    stored = opened.gather(draw, np.arange(len(opened)))
    for position, field in enumerate(("image", "noise", "label")):
        arrays = join([parts[position] for parts in found])
        assert arrays.dtype == stored[field].dtype
        assert np.array_equal(arrays, stored[field])


def test_a_stock_reader_runs_as_a_script(name: str, script: Callable[..., str], store: Callable[[str], Path]) -> None:
    assert script(f"{name}.py", store(READERS[name])) == "600 pairs of draw 0\n"


def test_a_stock_reader_names_the_layout_that_it_reads_where_the_store_has_another(
    name: str, script: Callable[..., str], store: Callable[[str], Path]
) -> None:
    other = store("blocks" if name != "stock_webdataset" else "zarr")
    with pytest.raises(SystemExit, match=f"{other} has .*--layout {READERS[name]} --codec float16"):
        script(f"{name}.py", other)


@pytest.mark.parametrize("name", ["stock_webdataset", "stock_webdataset_samples"])
def test_a_stock_reader_of_tars_says_that_a_store_is_not_finished(
    name: str, script: Callable[..., str], store: Callable[[str], Path], tmp_path: Path
) -> None:
    unsealed = Path(shutil.copytree(store(READERS[name]), tmp_path / "store"))
    for manifest in unsealed.glob("manifest.g*.json"):
        manifest.unlink()
    with pytest.raises(SystemExit, match=f"{unsealed} is not finished"):
        script(f"{name}.py", unsealed)


def test_a_stock_reader_has_no_code_of_ours(name: str, example: Callable[[str], ModuleType]) -> None:
    source = Path(str(example(name).__file__)).read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    assert not any("nfm" in ast.unparse(node) for node in imports)
