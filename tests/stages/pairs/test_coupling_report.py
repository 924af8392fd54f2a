"""The coupling report of a store: figures on pairs with known values, advice, and the commands that show it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nfm.pipeline.cli.pairs import pairs as command
from nfm.stages.couplings.facts import FACTS
from nfm.stages.pairs import coupling_report
from nfm.stages.pairs.coupling_sample import draw_sample, row_counts
from nfm.stages.stores import audit
from nfm.stages.stores import info as pairs_info
from nfm.stages.trained import teacher
from nfm.storage import DatasetWriter, PairStore
from nfm.storage.files import atomic
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import StoreSpec, write_spec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.generation import Generation
from nfm.storage.ledger.shard_writer import write_shard
from nfm.trainers.checkpoint import pack_weights
from nfm.trainers.models.tarflow import TarFlow, nll_per_dim

SHAPE = (1, 8, 8)
DATA, TEACHER = "ab" * 32, "cd" * 32
Make = Callable[..., Path]


def normal(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


def images(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE)).astype(np.uint8)


@pytest.fixture
def well_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network of the AUC is trained as users have it; where nobody looks at its AUC, for a moment."""
    monkeypatch.setattr(coupling_report, "AUC_PAIRS", 40_000)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make("nfm", noise [draws * rows, ...]) -> the root of a sealed store of 300 rows in shards of 128."""

    def make(
        coupling: str,
        noise: np.ndarray,
        image: np.ndarray | None = None,
        *,
        rows: int = 300,
        row: np.ndarray | None = None,
        codec: str = "float32",
        nll: float = math.nan,
        root: Path = tmp_path / "pairs" / "store",
        excluded: dict[str, str] | None = None,
    ) -> Path:
        draws = len(noise) // rows
        image = images(rows) if image is None else image
        spec = StoreSpec(
            rows=rows, rows_per_shard=128, rows_per_block=32, fields=pair_fields(SHAPE, codec, image.dtype.name),
            coupling=coupling, source=DATA, codec=codec, classes=2, teacher=TEACHER if coupling == "nfm" else None,
        )  # fmt: skip
        root.mkdir(parents=True)
        write_spec(root, spec)
        for draw in range(draws):
            for shard in range(spec.shards_per_draw):
                slots = np.array(spec.slots_of(shard))
                if excluded and f"d{draw:03d}-s{shard:05d}" in excluded:
                    continue
                own = slots if row is None else row[draw * rows + slots]
                record = {
                    "image": image[own], "noise": noise[draw * rows + slots], "label": slots % 2, "slot": slots,
                    "row": own, "flip": slots < 0, "nll": np.full(len(slots), nll, np.float32),
                }  # fmt: skip
                commits.publish(root, write_shard(root, spec, draw, shard, "a1", [record]))
        seal.seal(root, draws, excluded)
        return root

    return make


@pytest.fixture
def lineage(tmp_path: Path) -> dict[str, Path]:
    """A data artifact with 40 held-out rows and an untrained teacher."""
    data, flow = tmp_path / "data" / "d", tmp_path / "teacher" / "t"
    writer = DatasetWriter(data, "known", SHAPE, ["even", "odd"])
    for split, count, seed in (("train", 300, 1), ("heldout", 40, 2)):
        keys = [f"{split}-{at}" for at in range(count)]
        writer.write_split(split, count, [(images(count, seed), np.arange(count) % 2, keys)])
    writer.close()
    architecture: dict[str, Any] = {
        "image_shape": list(SHAPE), "classes": 2, "patch": 4, "channels": 32, "blocks": 2, "layers": 1, "head_size": 32,
    }  # fmt: skip
    flow.mkdir(parents=True)
    torch.manual_seed(0)
    (flow / "weights.safetensors").write_bytes(pack_weights(TarFlow(**architecture), architecture))
    atomic.write_json(flow / "teacher.json", {"eta": 0.1, "sigma_f": 1.0, "architecture": architecture})
    for folder, content in ((data, DATA), (flow, TEACHER)):
        atomic.write_json(folder / "spec.json", {"stage": folder.parent.name})
        atomic.write_json(folder / "manifest.json", {"content_digest": content})
    return {"data": data, "teacher": flow}


def measured(root: Path, inputs: dict[str, Path] | None = None) -> dict[str, Any]:
    body = coupling_report.measure(PairStore.open(root), inputs or {})
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    return body


@pytest.mark.usefixtures("well_trained")
def test_an_independent_store_is_found_to_be_what_it_is(make: Make) -> None:
    root = make("independent", normal(600))
    body = measured(root)
    assert (body["pairs"], body["shards"]) == (300, 3)
    assert abs(body["auc"] - 0.5) < 3.5 * body["auc_error"]
    assert body["transport_cost"] == pytest.approx(body["transport_cost_independent"], rel=0.03)
    assert body["noise"]["var"] == pytest.approx(body["noise_expected"]["var"], rel=0.3)
    assert body["noise"]["ks_p"] > 0.001
    assert [row["label"] for row in body["classes"]] == [0, 1]
    rows = body["rows"]
    assert (rows["fewest"], rows["most"], rows["never"], rows["chi2"], rows["all_counted"]) == (2, 2, 0.0, 0.0, True)
    assert (body["nll_train"], body["nll_heldout"]) == (None, None)
    assert coupling_report.advice(body) == []
    assert body == measured(root)


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_noise_is_decoded_and_the_transport_cost_is_that_of_the_pairs(make: Make, codec: str) -> None:
    """z = x + 0.5 costs 0.25 a dimension; the mean over permutations is known by trying many."""
    x = images(300).astype(np.float32) * np.float32(2 / 255) - 1
    body = measured(make("custom", x + 0.5, codec=codec))
    assert body["transport_cost"] == pytest.approx(0.25, rel=0.02)
    random, z = np.random.default_rng(0), x + 0.5
    tried = np.mean([np.square(z[random.permutation(300)] - x).mean() for _ in range(200)])
    assert body["transport_cost_independent"] == pytest.approx(tried, rel=0.005)


@pytest.mark.usefixtures("well_trained")
def test_noise_that_moments_do_not_show_is_found_and_advised_on(make: Make, lineage: dict[str, Path]) -> None:
    z = normal(1500)
    z[..., 1::2] = np.abs(z[..., 1::2]) * np.sign(z[..., 0::2])  # signs in equal pairs: every value is N(0, 1)
    body = measured(make("nfm", z, images(1500), rows=1500, nll=0.2), lineage)
    assert body["noise"]["var"] < 2 * body["noise_expected"]["var"]
    assert body["noise"]["kurtosis"] < 2 * body["noise_expected"]["kurtosis"]
    assert body["auc"] > 0.8
    said = " ".join(coupling_report.advice(body))
    assert f"AUC {body['auc']:.2f}, 0.5 is perfect" in said
    assert "student.soften = 0.5" in said
    assert "two-sample AUC" in coupling_report.lines(body)


@pytest.mark.parametrize(
    ("auc", "error", "best", "advised"),
    [
        (0.61, 0.005, "with up to 5 evaluations this, with more", "; with more than 5 evaluations semidiscrete-ot is"),
        (0.69, 0.005, "with up to 5 evaluations this or semidiscrete-ot, close", "; semidiscrete-ot is likely as good"),
        (0.75, 0.03, "with up to 5 evaluations this or semidiscrete-ot, close", "; semidiscrete-ot is likely as good"),
        (0.75, 0.005, "semidiscrete-ot, until a longer trained", "; until then semidiscrete-ot is likely the better"),
    ],
)
def test_the_coupling_that_is_likely_best_is_told_before_a_student_is_trained(
    make: Make, auc: float, error: float, best: str, advised: str
) -> None:
    body = measured(make("nfm", normal(300), nll=0.2)) | {"auc": auc, "auc_error": error}
    assert coupling_report.lines(body)["likely best"].startswith(best)
    assert advised in " ".join(coupling_report.advice(body))
    other = body | {"coupling": "semidiscrete-ot"}
    assert "likely best" not in coupling_report.lines(other)


def test_moments_name_the_dimension_and_the_class_that_are_off(make: Make) -> None:
    z = normal(300)
    z[1::2, 0, 3, 3] = 3 * z[1::2, 0, 3, 3] + 1
    body = measured(make("custom", z))
    assert body["noise"]["var_worst"] > 3
    assert body["noise"]["mean_worst"] == pytest.approx(0.5, abs=0.25)
    even, odd = body["classes"]
    assert odd["var"] > 5 * odd["expected"]["var"]
    assert even["var"] < 2 * even["expected"]["var"]
    assert "class, 1, of 2" in coupling_report.lines(body)["z by class"]
    assert "z's variance differs from 1" in " ".join(coupling_report.advice(body))


def test_noise_of_a_wrong_scale_is_told_whatever_its_mean(make: Make) -> None:
    told = coupling_report.advice(measured(make("external", 30 * normal(300) + 2)))
    for parts in (
        ("variance differs from 1", "divide it by"),
        ("mean differs from 0", "take its mean off"),
    ):
        assert [text for text in told if all(part in text for part in parts)]
    assert "teacher" not in " ".join(told)


def test_rows_are_counted_from_the_index_and_uneven_ones_advised_on(make: Make) -> None:
    row = np.arange(600) % 300
    row[row < 150] = 0  # half the pairs have the first image
    root = make("semidiscrete-ot", normal(600), row=row)
    found = measured(root)["rows"]
    assert (found["counted"], found["fewest"], found["most"]) == (600, 0, 300)
    assert found["never"] == pytest.approx(149 / 300)
    shares = np.bincount(row, minlength=300) / 600
    assert found["chi2"] == pytest.approx(np.square(shares - 1 / 300).sum() * 300, rel=1e-5)
    assert found["chi2_expected"] == pytest.approx(299 / 600, rel=1e-5)
    assert "fit the potential longer" in " ".join(coupling_report.advice(measured(root)))


def test_rows_drawn_at_random_are_no_finding(make: Make) -> None:
    row = np.random.default_rng(3).integers(0, 300, 600)
    body = measured(make("semidiscrete-ot", normal(600), row=row))
    assert body["rows"]["chi2"] == pytest.approx(body["rows"]["chi2_expected"], rel=0.3)
    assert coupling_report.advice(body) == []


def test_excluded_pairs_are_counted_out_and_stated(make: Make) -> None:
    root = make("independent", normal(600), excluded={"d001-s00001": "tried three times"})
    counts, whole = row_counts(PairStore.open(root), 0)
    assert whole
    assert (counts[:128] == 2).all()
    assert (counts[128:256] == 1).all()
    body = measured(root)
    assert body["excluded"] == 128
    assert "128 pairs excluded" in coupling_report.lines(body)["image rows"]
    assert body["rows"]["chi2"] == pytest.approx(0.0988, abs=1e-3)
    assert "run the pairs stage again to encode what is excluded" in " ".join(coupling_report.advice(body))


def test_no_slot_is_in_the_sample_twice_whatever_the_draws(make: Make) -> None:
    x = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None, None], (256, *SHAPE))
    root = make("independent", normal(1024), np.ascontiguousarray(x), rows=256)
    sample = draw_sample(PairStore.open(root), 0)
    assert len(np.unique(sample.image[:, 0])) == len(sample.image) == 256
    slots = np.rint((sample.image[:, 0] + 1) * 127.5).astype(int)
    assert np.isin(slots, np.arange(256)).all()
    stored = [PairStore.open(root).gather(draw, slots)["noise"].reshape(256, -1) for draw in range(4)]
    np.testing.assert_array_equal(sum((own == sample.noise).all(axis=1).astype(int) for own in stored), 1)
    again, other = draw_sample(PairStore.open(root), 0), draw_sample(PairStore.open(root), 1)
    np.testing.assert_array_equal(sample.noise, again.noise)
    assert not np.array_equal(sample.noise, other.noise)


def test_nll_of_held_out_rows_is_the_teachers_and_an_overfitted_one_is_named(
    make: Make, lineage: dict[str, Path]
) -> None:
    body = measured(make("nfm", normal(300), nll=0.05), lineage)
    x = torch.from_numpy(images(40, 2)).float() * 2 / 255 - 1
    noised = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        expected = nll_per_dim(*teacher.load(lineage["teacher"])[0].encode(noised, torch.arange(40) % 2)).mean()
    assert body["nll_heldout"] == pytest.approx(float(expected), rel=0.02)
    assert body["nll_heldout_rows"] == 40
    assert body["nll_train"] == pytest.approx(0.05)
    assert "the teacher is overfitted: 0.050" in " ".join(coupling_report.advice(body))
    assert "on held-out ones" in coupling_report.lines(body)["nll"]


@pytest.mark.parametrize(
    ("flops", "device", "rows", "batch"),
    [
        (1e6, "cpu", 2048, 128),
        (2e10, "cpu", 500, 10),
        (3e11, "cpu", 33, 1),
        (4e11, "cpu", 0, 1),
        (1e12, "cuda", 2048, 10),
    ],
)
def test_held_out_rows_stay_within_their_budget_whatever_the_teacher(
    flops: float, device: str, rows: int, batch: int
) -> None:
    assert coupling_report.heldout_rows(50_000, flops, device) == rows
    assert coupling_report.heldout_batch(flops, 64, device) == batch
    assert rows * flops <= coupling_report.HELDOUT_FLOPS or device != "cpu"


def test_held_out_rows_are_measured_only_with_the_teacher_of_the_store(make: Make, lineage: dict[str, Path]) -> None:
    root = make("nfm", normal(300), nll=0.05)
    assert measured(root)["nll_heldout"] is None
    atomic.write_json(lineage["teacher"] / "manifest.json", {"content_digest": "ef" * 32})
    assert measured(root, lineage)["nll_heldout"] is None


def test_every_coupling_says_what_is_exact_and_what_is_not() -> None:
    for name, facts in FACTS.items():
        assert facts.exact
        assert bool(facts.approximate) == (name != "independent")
        assert facts.gaussian == any(told.startswith("the noise is N(0, I)") for told in facts.exact)


def test_the_command_measures_a_store_sealed_without_a_report(
    make: Make, lineage: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make("nfm", normal(300), nll=0.3)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    info = pairs_info.info(root)
    assert "nfm pairs report" in info["coupling report"]
    monkeypatch.setenv("NFM_ARTIFACTS", str(tmp_path))
    done = CliRunner().invoke(command, ["report", str(root), "--json"])
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert body["nll_heldout_rows"] == 40
    assert body["pairs"] == 300
    (lineage["teacher"] / "manifest.json").unlink()
    done = CliRunner().invoke(command, ["report", str(root)])
    assert done.exit_code == 0, done.output
    assert f"teacher {TEACHER[:12]} not found" in done.output
    assert "two-sample AUC" in done.output
    assert before == {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_info_shows_the_report_that_a_manifest_carries(make: Make) -> None:
    torch.manual_seed(0)
    root = make("custom", normal(300) * 1.5)
    body = measured(root)
    manifest = seal.manifest_path(root, 1)
    atomic.write_json(manifest, json.loads(manifest.read_text()) | {"coupling_report": body})
    info = pairs_info.info(root)
    assert info["transport cost"] == coupling_report.lines(body)["transport cost"]
    assert "z's variance differs from 1" in info["advice 1"] + info.get("advice 2", "")


@pytest.mark.parametrize(("scale", "named"), [(1.0, False), (127.0, True), (0.01, True)])
def test_images_of_another_scale_are_named_in_place_of_the_teachers_training(
    make: Make, tmp_path: Path, scale: float, named: bool
) -> None:
    floats = (normal(16, 3) * scale).astype(np.float32)
    body = measured(make("nfm", normal(16) * 3, floats, rows=16))  # too few for an AUC, which takes seconds
    assert body["image"] == {
        "dtype": "float32",
        "low": pytest.approx(float(floats.min()), rel=1e-5),
        "high": pytest.approx(float(floats.max()), rel=1e-5),
        "size": pytest.approx(float(np.sqrt(np.square(floats, dtype=np.float64).mean())), rel=1e-5),
    }
    said = " ".join(coupling_report.advice(body | {"auc": 0.99, "auc_error": 0.01}))
    assert "z's mean differs from 0" in said
    assert "AUC 0.99" in said
    assert ("train the teacher longer" in said) != named
    assert ("mend the images' scale first" in said) == named
    assert (f"root mean square {body['image']['size']:.4g}, where teacher and student want about 1" in said) == named
    sealed = seal.load(tmp_path / "pairs" / "store", 1)
    reported = Generation(sealed.root, sealed.spec, 1, {**sealed.body, "coupling_report": body})
    (finding,) = audit._marginals(reported)
    assert ("mend the images' scale first" in finding.remedy) == named  # the audit gives the same advice


def test_a_report_from_before_the_scale_was_measured_still_gives_advice(make: Make) -> None:
    body = measured(make("nfm", normal(16) * 3, images(16), rows=16))
    assert body["image"]["dtype"] == "uint8"
    older = {key: value for key, value in body.items() if key != "image"}
    assert coupling_report.advice(older) == coupling_report.advice(body) != []
