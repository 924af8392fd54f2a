"""`python -m benchmarks.encode` measures every way of encoding, reports failures, and its parts do what they claim."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.encode.command import encode, targets
from benchmarks.encode.rows import PLAIN, Case, measure
from nfm.stages.trained import costs
from nfm.trainers.models.tarflow import TarFlow

SIZES = ("--image", "1x8x8", "--patch", "4", "--channels", "64", "--blocks", "1", "--layers", "1", "--batch", "4")


def case(**changes: object) -> Case:
    sizes = {
        "name": "tiny", "image_shape": (1, 8, 8), "classes": 3, "patch": 2, "channels": 32, "blocks": 2, "layers": 1,
        "head_size": 32, "batch": 4, "device": "cpu", "threads": 1, "probed": 0.02,
    }  # fmt: skip
    return Case(**{**sizes, **changes})  # type: ignore[arg-type]


def test_one_command_writes_every_row_with_the_machine_and_the_shards(tmp_path: Path) -> None:
    output = tmp_path / "encode" / "tiny.json"
    arguments = [*SIZES, "--quick", "--threads", "1", "--no-compile", "--out", str(output)]
    result = CliRunner().invoke(encode, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    body = json.loads(output.read_text())
    found = body["cases"]["1x8x8"]
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [PLAIN, "ours float32", "ours bfloat16"]
    assert rows[PLAIN]["batch"] == 4
    for row in rows.values():
        assert row["images_per_second"] > 0
        assert row["gflops"] == pytest.approx(row["images_per_second"] * found["gflop_per_image"], rel=0.1, abs=0.1)
        assert row["name"] in result.output
    assert rows["ours float32"]["noise_rms_error"] < 1e-5 < rows["ours bfloat16"]["noise_rms_error"]
    assert sum(found["profile"]["share_of_time"].values()) == pytest.approx(1, abs=0.01)
    assert found["profile"]["share_of_time"]["matrix products"] > 0
    assert body["shards"]["shard_images_per_second"] > 0
    assert {"cpu", "cores", "device", "threads"} <= set(body["machine"])
    assert str(tmp_path) not in output.read_text()


def test_a_compiler_that_fails_is_told_and_leaves_the_others_their_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TarFlow, **options: object) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("no compiler here")

        self.encode = fail  # type: ignore[method-assign, assignment]

    monkeypatch.setattr(TarFlow, "compile", broken)
    rows = {row["name"]: row for row in measure(case(), 1, compiled=True)["rows"]}
    assert rows["ours float32, compiled"]["not_measured"] == "RuntimeError: no compiler here"
    assert rows["ours float32"]["images_per_second"] > 0


def test_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    sizes = case(channels=64, head_size=64, layers=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sizes.model().encode(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))
    tokens, _ = costs.tokens_of(sizes.image_shape, sizes.patch)
    attention = 2 * sizes.blocks * sizes.layers * tokens**2 * sizes.channels
    assert counter.get_total_flops() in (sizes.flops - attention, sizes.flops + attention)


def test_targets_are_of_wide_models_and_of_ray() -> None:
    row = {"name": "ours float32", "of_best_matrix_rate": 0.61}
    wide = {"sizes": {"channels": 256}, "rows": [row], "fastest": "ours float32"}
    narrow = {**wide, "sizes": {"channels": 128}}
    lines = targets({"cases": {"a": wide, "b": narrow}, "ray": {"ray_over_serial": 0.94}})
    assert [(line["measured"], line["met"]) for line in lines] == [(0.61, True), (0.94, False)]


def test_sizes_that_do_not_fit_are_wrong_use() -> None:
    runner = CliRunner()
    assert "3x64x64" in runner.invoke(encode, ["--image", "3,64,64"]).output
    assert "with -c" in runner.invoke(encode, ["-c", __file__]).output
