"""The report page, built from small artifacts that the real writers made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nfm.stages.base import StageError
from nfm.stages.data import stage as data
from nfm.stages.display.units import duration
from nfm.stages.report import stage as report
from nfm.stages.report.html import column_texts, number
from nfm.stages.report.stage import ReportConfig
from nfm.storage import ImageDataset, StorageError, StoreSpec
from nfm.storage.files.atomic import write_json
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import write_spec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.shard_writer import write_shard
from tests.support.recorder import Recorder

NFE = {31: "heun", 15: "heun", 7: "heun", 5: "euler"}


def manifest(root: Path, stage: str, name: str = "manifest.json", **more: object) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    body = {"stage": stage, "fingerprint": f"{stage}-fingerprint", "content_digest": f"{stage}-content"}
    body |= {
        "inputs": {},
        "metrics": {"images": 1707},
        "config": {"seed": 0},
        "versions": {},
        "seconds": 75.0,
    }
    write_json(root / name, body | more)
    return root


def make_pairs(root: Path, source: ImageDataset, coupling: str) -> Path:
    rows = len(source)
    spec = StoreSpec(
        rows=rows,
        rows_per_shard=1000,
        fields=pair_fields(source.image_shape, "float16"),
        coupling=coupling,
        source="s",
    )
    root.mkdir()
    write_spec(root, spec)
    for shard in range(spec.shards_per_draw):
        slots = np.array(spec.slots_of(shard))
        images = source.images(slots)
        noise = np.random.default_rng(shard).normal(size=images.shape)
        if coupling == "nfm":
            noise = (noise + (images / 127.5 - 1)) / np.sqrt(1.5)
        record = {
            "image": images,
            "noise": noise.astype(np.float32),
            "label": source.labels(slots),
            "slot": slots,
        }
        commits.publish(root, write_shard(root, spec, 0, shard, "a1", [record]))
    seal.seal(root, 1, stage="pairs", fingerprint="pairs-fingerprint", metrics={}, seconds=4.0)
    return root


def make_training(root: Path, stage: str, unit: str, heldout: bool) -> Path:
    manifest(root, stage)
    lines = []
    for step in range(1, 60):
        line = {unit: step * 5000, "loss": 0.4 + 1.2 * np.exp(-step / 9), "learning_rate": 1e-3}
        if heldout and step % 6 == 0:
            line |= {"train_bpd": 3.1 + np.exp(-step / 20), "heldout_bpd": 3.2 + np.exp(-step / 22)}
        lines.append(json.dumps(line))
    (root / "metrics.jsonl").write_text("\n".join(lines) + '\n{"loss": 0.')  # a kill cut the last line
    return root


def make_evaluation(root: Path, source: ImageDataset) -> Path:
    rows = [{"name": "floor", "model": "floor", "fd_cnn": 0.8, "kid": 1e-4, "kid_error": 1e-5, "samples": 90}]
    for sampler, distance in (("inverse", 4.1), ("inverse+score", 3.1)):
        rows.append({"name": f"teacher-{sampler}", "model": "teacher", "sampler": sampler, "fd_cnn": distance})
        rows[-1] |= {"kid": 4e-3, "kid_error": 2e-4, "guidance": 1.5, "parameters": 812_000}
    for coupling, worse in (("nfm", 1.0), ("independent", 2.6)):
        for nfe, sampler in NFE.items():
            name = f"student-{coupling}-{sampler}-{nfe}"
            rows.append({"name": name, "model": "student", "coupling": coupling, "sampler": sampler, "nfe": nfe})
            rows[-1] |= {"guidance": None, "samples": 10000, "fd_cnn": worse * (2 + 12 / nfe), "kid": 0.002}
            rows[-1] |= {"kid_error": 1e-4, "images_per_second": 50000 / nfe, "batch": 512}
            rows[-1] |= {"latency_seconds": 0.002 * nfe, "parameters": 3_400_000}
    curvature = [
        {"model": "student", "coupling": name, "value": value, "steps": 128, "trajectories": 256}
        for name, value in (("nfm", 0.0181), ("independent", 0.0386))
    ]
    body = {"rows": rows, "curvature": curvature, "machine": "x86_64, cpu, 2 threads"}
    body["reference"] = {"rows": 1707, "split": "train"}
    manifest(root, "evaluate")
    write_json(root / "evaluation.json", body)
    (root / "samples").mkdir()
    rng = np.random.default_rng(0)
    for row in rows[1:]:
        images = source.images(rng.integers(0, len(source), 64)).astype(float)
        images += rng.normal(0, 6 * row["fd_cnn"], images.shape)
        np.savez(root / "samples" / f"{row['name']}.npz", images=np.clip(images, 0, 255).astype(np.uint8))
    return root


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("artifacts")
    (root / "data").mkdir()
    made = data.run(data.DataConfig(), {}, root / "data", Recorder())
    manifest(root / "data", "data", **made.extra)
    source = ImageDataset.open(root / "data")
    return {
        "evaluate": make_evaluation(root / "evaluate", source),
        "student:independent": make_training(root / "student1", "student", "pairs_seen", False),
        "pairs:independent": make_pairs(root / "pairs1", source, "independent"),
        "student": make_training(root / "student0", "student", "pairs_seen", False),
        "pairs": make_pairs(root / "pairs0", source, "nfm"),
        "teacher": make_training(root / "teacher", "teacher", "images_seen", True),
        "features": manifest(root / "features", "features"),
        "data": root / "data",
    }


@pytest.fixture(scope="module")
def html(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("report")
    result = report.run(ReportConfig(), inputs, out, Recorder())
    assert list(result.payload) == ["report.html"]
    return (out / "report.html").read_text()


def test_the_page_makes_no_external_request(html: str) -> None:
    sources = re.findall(r'(?:src|srcset|href)="([^"]{0,40})', html)
    assert len(sources) > 20
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"url\(|@import|<script|<link|<iframe", html)


def test_sections_stand_in_the_order_of_the_pipeline(html: str) -> None:
    headings = re.findall(r"<h2>([^<]+)</h2>", html)
    assert headings == ["Stages", "Data", "Teacher", "Pairs", "Students", "Evaluation"]
    rows = re.findall(r"<tr><td>([\w:]+)</td><td><code>", html)
    assert rows[:5] == ["data", "features", "teacher", "pairs", "pairs:independent"]
    assert rows[5:] == ["student", "student:independent", "evaluate"]


def test_every_tag_is_closed(html: str) -> None:
    class Balance(HTMLParser):
        open_tags: list[str] = []  # noqa: RUF012 - one parser only

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img", "source"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open_tags.pop() == tag

    parser = Balance()
    parser.feed(html)
    assert not parser.open_tags


def test_every_sampler_has_a_row_and_a_grid(html: str) -> None:
    for coupling in ("nfm", "independent"):
        for nfe, sampler in NFE.items():
            assert f"{coupling} student, {sampler.capitalize()}, NFE {nfe}</b>" in html
            assert f"<td>student</td><td>{coupling}</td><td>{sampler}</td><td class=n>{nfe}</td>" in html
    assert "<td>floor</td>" in html
    assert "teacher, inverse+score, guidance 1.5" in html
    assert "3,400,000" in html
    assert html.count("<tr class=best><td>student</td><td>nfm</td>") == 4


def test_pairs_show_images_noise_and_moments_of_both_couplings(html: str) -> None:
    assert html.count("images above their noise") == 2
    assert "kurtosis" in html
    assert "density of noise values against the standard normal" in html


def test_text_from_outside_is_escaped(inputs: dict[str, Path], tmp_path: Path) -> None:
    evil = tmp_path / "features"
    manifest(evil, "features", metrics={"note": "<script>alert(1)</script>"})
    report.run(ReportConfig(), {**inputs, "features": evil}, tmp_path, Recorder())
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_same_inputs_give_the_same_page(inputs: dict[str, Path], html: str, tmp_path: Path) -> None:
    report.run(ReportConfig(), inputs, tmp_path, Recorder())
    assert (tmp_path / "report.html").read_text() == html


def test_a_run_without_baselines_or_evaluation_still_has_its_page(inputs: dict[str, Path], tmp_path: Path) -> None:
    few = {role: inputs[role] for role in ("data", "teacher", "pairs", "student")}
    assert report.run(ReportConfig(samples=8), few, tmp_path, Recorder()).metrics["sections"] == 5


def test_missing_inputs_are_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StageError, match="needs the data artifact"):
        report.run(ReportConfig(), {}, tmp_path, Recorder())
    with pytest.raises(StorageError, match="manifest"):
        report.run(ReportConfig(), {"data": tmp_path}, tmp_path, Recorder())


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (number, 3_400_000, "3,400,000"),
        (number, 0.01814, "0.01814"),
        (number, 12345.6, "12,346"),
        (number, 2e-6, "2.000e-06"),
        (number, 0.0, "0"),
        (number, float("nan"), "nan"),
        (duration, 4.04, "4.0 s"),
        (duration, 75.0, "1 min 15 s"),
        (duration, 5400.0, "1 h 30 min"),
    ],
)
def test_figures_read_as_people_write_them(show: Callable[[float], str], value: float, text: str) -> None:
    assert show(value) == text


def test_a_columns_fractions_share_their_decimals() -> None:
    assert column_texts([2.387, 0.8, 11.44, None]) == ["2.39", "0.80", "11.44", "–"]
    assert column_texts([1.5, 1.5]) == ["1.5", "1.5"]
    assert column_texts([0.0181, 0.0386]) == ["0.0181", "0.0386"]
    assert column_texts([3_400_000, None]) == ["3,400,000", "–"]
    assert column_texts([0.5, float("nan")]) == ["0.5", "nan"]
    assert column_texts(["<b>", True]) == ["&lt;b&gt;", "True"]
