"""The comparison, from evaluations and stores as their stages leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from nfm.stages.base import Result, StageError
from nfm.stages.evaluation import compare, compare_plots, compare_table
from nfm.stages.evaluation.compare import CompareConfig
from nfm.storage import StoreSpec
from nfm.storage.files.atomic import read_json, write_json
from nfm.storage.format.fields import pair_fields
from nfm.storage.format.spec import write_spec
from nfm.storage.ledger import commits, seal
from nfm.storage.ledger.shard_writer import write_shard
from tests.support.recorder import Recorder

# Distances by NFE of seed 0; the seeds after it add 1 each.
DISTANCES = {"independent": {7: 40.0, 3: 70.0}, "nfm": {7: 22.0, 3: 30.0}, "nfm:soften=0.5": {7: 19.0, 3: 33.0}}
FLOOR = 2.0
CONFIG = CompareConfig(couplings=("independent@0", "nfm@0+1+2", "nfm:soften=0.5@0"))
Distances = Mapping[str, Mapping[int, float]]


def row(name: str, model: str, sampler: str | None, nfe: int | None, distance: float, speed: float) -> dict[str, Any]:
    sampled = {"images_per_second": speed, "batch": 32, "latency_seconds": 1 / speed, "parameters": 1000}
    told = sampled if sampler else dict.fromkeys(sampled)
    return {"name": name, "model": model, "coupling": None, "sampler": sampler, "nfe": nfe,
            "guidance": 0.0 if sampler else None, "samples": 100, "fd_cnn": distance, "kid": distance / 1000,
            "kid_error": 0.001, "precision": 0.5, **told}  # fmt: skip


def evaluation(root: Path, rows: list[dict[str, Any]], curvature: list[dict[str, Any]]) -> Path:
    root.mkdir(parents=True)
    floor = row("floor", "floor", None, None, FLOOR, 1.0)
    body = {"rows": [floor, *rows], "curvature": curvature, "machine": "test", "reference": {"rows": 9}}
    write_json(root / "evaluation.json", body)
    return root


def student(root: Path) -> Path:
    root.mkdir(parents=True)
    lines = [json.dumps({"pairs_seen": 100 * step, "loss": 1 / step}) for step in range(1, 9)]
    (root / "metrics.jsonl").write_text("\n".join(lines))
    write_json(root / "manifest.json", {"metrics": {"pairs_seen": 800, "pairs_per_second": 50.0, "parameters": 1000}})
    return root


def store(root: Path, coupling: str, rows: int = 8, auc: float | None = None) -> Path:
    fields = pair_fields((1, 2, 2), "float16")
    spec = StoreSpec(rows=rows, rows_per_shard=8, fields=fields, coupling=coupling, source="s")
    root.mkdir(parents=True)
    write_spec(root, spec)
    slots = np.arange(rows)
    images, noise = np.zeros((rows, 1, 2, 2), np.uint8), np.ones((rows, 1, 2, 2), np.float32)
    record: dict[str, np.ndarray] = {"image": images, "noise": noise, "label": slots, "slot": slots}
    commits.publish(root, write_shard(root, spec, 0, 0, "a1", [record]))
    report: dict[str, Any] = {} if auc is None else {"coupling_report": {"auc": auc, "transport_cost": 1.5}}
    seal.seal(root, 1, stage="pairs", fingerprint="f", metrics={}, seconds=1.0, **report)
    return root


def inputs(
    root: Path, speed: float = 10.0, config: CompareConfig = CONFIG, distances: Distances = DISTANCES,
    machines: Mapping[str, str] = {},
) -> dict[str, Path]:  # fmt: skip
    """What a comparison reads; `machines` gives those of the students whose rows name one, by `VARIANT@SEED`."""
    found = {
        "evaluate:teacher": evaluation(root / "et", [row("teacher", "teacher", "inverse", 1, 50.0, speed / 5)], []),
        "pairs:independent": store(root / "pi", "independent"),
        "pairs:nfm": store(root / "pn", "nfm", auc=0.6),
    }
    for variant, seed in config.students():
        name = f"{variant}@{seed}"
        rows = [
            row(f"student-{variant}-{nfe}", "student", "heun" if nfe > 5 else "euler", nfe, value + seed, speed * nfe)
            for nfe, value in distances[str(variant)].items()
        ]
        rows = [{**one, "machine": machines[name]} for one in rows] if name in machines else rows
        bend = {"model": "student", "coupling": str(variant), "value": 0.2 if variant.coupling == "nfm" else 0.4}
        found[f"evaluate:{name}"] = evaluation(root / f"e{name}", rows, [{**bend, "steps": 128, "trajectories": 8}])
        found[f"student:{name}"] = student(root / f"s{name}")
    return found


@pytest.fixture
def pictures() -> None:
    """For a test that looks at the plots."""


@pytest.fixture(autouse=True)
def _drawn_where_looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four plots take half a second."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(compare_plots, "png", lambda *panels: b"")


def made(root: Path, speed: float = 10.0, **given: Any) -> tuple[Result, dict[str, Any], Path]:
    out = root / "out"
    out.mkdir(parents=True)
    result = compare.run(given.get("config", CONFIG), inputs(root, speed, **given), out, Recorder())
    return result, json.loads((out / "compare.json").read_text()), out


def compared(root: Path, distances: Distances) -> tuple[list[str], str]:
    """The sentences and the text of variants with these distances, a seed each."""
    _, body, out = made(root, config=CompareConfig(couplings=tuple(distances)), distances=distances)
    return body["conclusions"], (out / "compare.txt").read_text()


def test_rows_hold_mean_spread_and_values_by_seed_of_every_metric(tmp_path: Path) -> None:
    _, body, _ = made(tmp_path)
    rows = {(row["variant"], row["nfe"]): row for row in body["rows"]}
    assert set(rows) == {(variant, nfe) for variant in DISTANCES for nfe in (7, 3)}
    several = rows["nfm", 7]["metrics"]
    assert several["fd_cnn"] == {"mean": 23.0, "spread": 1.0, "values": {"0": 22.0, "1": 23.0, "2": 24.0}}
    assert several["kid"]["mean"] == pytest.approx(0.023)
    assert rows["independent", 3]["metrics"]["fd_cnn"] == {"mean": 70.0, "spread": None, "values": {"0": 70.0}}
    assert rows["nfm", 3]["speeds"]["images_per_second"]["mean"] == 30.0
    assert [row["metrics"]["fd_cnn"]["mean"] for row in body["teacher"]] == [50.0]
    assert body["floor"]["metrics"]["fd_cnn"]["mean"] == FLOOR
    assert {row["variant"]: row["value"]["mean"] for row in body["curvature"]}["nfm"] == pytest.approx(0.2)
    assert body["losses"][0]["curve"][:2] == [[100, 1.0], [200, 0.5]]
    assert body["stores"]["nfm"]["auc"] == 0.6
    assert "auc" not in body["stores"]["independent"]


def test_the_text_ends_with_what_the_figures_say(tmp_path: Path) -> None:
    _, body, out = made(tmp_path)
    assert body["conclusions"] == [
        "Smallest FD-CNN: nfm:soften=0.5 at NFE 7 (19.00), nfm at NFE 3 (31.00, level with nfm:soften=0.5).",
        "At NFE 3, where independent is 1.75 times its own best, nfm, the best of 2 nfm variants, lies 29.00 above the "
        "floor of 2.000 and independent 68.00: 0.43 of it, at most half.",
        "The curvature of nfm is 0.50 times independent's.",
    ]
    text = (out / "compare.txt").read_text()
    assert text.strip().endswith(" ".join(body["conclusions"]))
    lines = {line.split("  ")[0]: line for line in text.splitlines()[1:5]}
    assert "23.00 ± 1.00" in lines["nfm"]
    assert "19.00 *" in lines["nfm:soften=0.5"]
    assert "teacher, inverse 50.00; floor 2.000" in text
    assert "\nSpeeds are of test.\n" in text
    assert "No coupling report: independent; `nfm pairs report STORE` measures one." in text


def test_the_text_repeats_what_the_evaluations_were_short_of(tmp_path: Path) -> None:
    found = inputs(tmp_path)
    for role, folder in found.items():
        if role.startswith("evaluate:"):
            write_json(folder / "evaluation.json", read_json(folder / "evaluation.json") | {"cut": ["too few images"]})
    (tmp_path / "out").mkdir()
    compare.run(CONFIG, found, tmp_path / "out", Recorder())
    assert "\ntoo few images.\n" in (tmp_path / "out" / compare.TEXT).read_text()


def test_a_control_is_neither_marked_nor_named_the_best(tmp_path: Path) -> None:
    told, text = compared(tmp_path, {"nfm": {7: 22.0}, "nfm:permuted": {7: 5.0}, "independent": {7: 40.0}})
    assert told[0] == "Smallest FD-CNN, controls aside: nfm at NFE 7 (22.00)."
    assert "At NFE 7, nfm lies 20.00" in told[1]
    lines = {line.split("  ")[0]: line for line in text.splitlines()[:5]}
    assert "* the best, controls aside" in text.splitlines()[0]
    assert lines["nfm"].endswith("22.00 *")
    assert lines["nfm:permuted"].endswith("5.000")
    alone, text = compared(tmp_path / "alone", {"nfm:permuted": {7: 5.0}})
    assert alone == []
    assert "5.000 *" not in text


def test_variants_are_level_within_a_tenth_or_the_spread_of_the_floor_or_of_seeds(tmp_path: Path) -> None:
    even = {7: 20.0, 3: 20.0}
    for place, (other, floor, seeds, says) in enumerate((
        (22.0, None, None, ", level with nfm"), (22.5, None, None, ""),
        (22.5, 2.5, None, ", level with nfm"), (22.5, None, 2.5, ", level with nfm"),
    )):  # fmt: skip
        _, body, _ = made(tmp_path / str(place), config=CompareConfig(couplings=("independent", "nfm")),
                          distances={"independent": even, "nfm": {7: other, 3: 30.0}})  # fmt: skip
        body["floor"]["metrics"]["fd_cnn"]["spread"] = floor
        body["rows"][0]["metrics"]["fd_cnn"]["spread"] = seeds
        assert f"independent at NFE 7 (20.00{says})" in compare_table.conclusions(body)[0]


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        (21.0, "0.50 of it, at most half"),
        (20.9999, "0.50 of it, at most half"),
        (21.0001, "0.500003 of it, more than half"),
        (21.04, "0.501 of it, more than half"),
    ],
)
def test_the_number_never_contradicts_the_verdict(tmp_path: Path, ours: float, says: str) -> None:
    told, _ = compared(tmp_path, {"nfm": {7: ours}, "independent": {7: 40.0}})
    assert f": {says}." in told[1]


def test_a_mixture_counts_as_what_most_of_its_pairs_are(tmp_path: Path) -> None:
    mostly = {"nfm": {7: 22.0}, "nfm:independent=0.8": {7: 9.0}, "independent": {7: 40.0}}
    assert "At NFE 7, nfm lies 20.00" in compared(tmp_path / "a", mostly)[0][1]
    half = {"nfm": {7: 22.0}, "nfm:independent=0.5": {7: 9.0}, "independent": {7: 40.0}}
    assert "nfm:independent=0.5, the best of 2 nfm variants, lies 7.000" in compared(tmp_path / "b", half)[0][1]


def test_speeds_are_averaged_over_one_machine_only_and_the_text_names_it(tmp_path: Path) -> None:
    one = {f"{variant}@{seed}": "a" for variant, seed in CONFIG.students()}
    results = [made(tmp_path / str(len(set(m.values()))), machines=m) for m in (one, {**one, "nfm@1": "b"})]
    rows = [{row["variant"]: row for row in body["rows"] if row["nfe"] == 7} for _, body, _ in results]
    assert rows[0]["nfm"]["speeds"]["images_per_second"]["mean"] == 70.0
    assert rows[1]["nfm"]["machines"] == ["a", "b"]
    assert rows[1]["nfm"]["speeds"] == {}
    assert rows[1]["independent"]["speeds"] == rows[0]["independent"]["speeds"]
    result, body, out = results[1]
    assert body["machines"] == ["a", "b", "test"]  # the teacher's rows name none: theirs is the evaluation's
    assert "Speeds are of 3 machines (1 is a; 2 is b; 3 is test)" in (out / "compare.txt").read_text()
    assert "speed.png" not in result.files
    written = [(out / "distances.json").read_bytes() for _, _, out in results]
    assert written[0] == written[1]


def test_the_nfe_of_the_reference_solver_is_not_a_column_of_the_comparison(tmp_path: Path) -> None:
    found = inputs(tmp_path)
    for seed in (0, 1, 2):
        limit = {**row("limit", "student", "dopri5", 91 + seed, 3.0, 1.0), "w2_points": 50, "w2_sets": 2}
        path = found[f"evaluate:nfm@{seed}"] / "evaluation.json"
        body = read_json(path)
        del body["digest"]
        write_json(path, {**body, "rows": [*body["rows"], limit]})
    (tmp_path / "out").mkdir()
    compare.run(CONFIG, found, tmp_path / "out", Recorder())
    body = json.loads((tmp_path / "out/compare.json").read_text())
    (limit,) = (row for row in body["rows"] if row["sampler"] == "dopri5")
    assert limit["nfe"] == 92
    assert (limit["w2_points"], limit["w2_sets"]) == (50, 2)
    assert not {"w2_points", "w2_sets"} & set(limit["metrics"])
    assert (
        body["conclusions"][0]
        == "Smallest FD-CNN: nfm:soften=0.5 at NFE 7 (19.00), nfm at NFE 3 (31.00, level with nfm:soften=0.5)."
    )
    assert (tmp_path / "out/compare.txt").read_text().splitlines()[1].endswith(" dopri5")


def test_variants_of_one_coupling_look_different_in_every_plot() -> None:
    names = ["nfm", *(f"nfm:soften=0.{number}" for number in range(1, 10))]
    styles = compare_plots._styles(names)
    assert len(set(styles.values())) == len(names)


def test_the_content_digest_is_of_what_was_found_never_of_speeds(tmp_path: Path) -> None:
    results = [made(tmp_path / str(speed), speed) for speed in (10.0, 20.0)]
    written = [[(out / name).read_bytes() for name in result.payload] for result, _, out in results]
    assert written[0] == written[1]
    assert results[0][1]["rows"][0]["speeds"] != results[1][1]["rows"][0]["speeds"]
    assert b"40.0" in written[0][0]


@pytest.mark.usefixtures("pictures")
def test_every_listed_file_is_there_and_plots_are_pictures(tmp_path: Path) -> None:
    result, _, out = made(tmp_path)
    names = [*result.payload, *result.files]
    assert all((out / name).stat().st_size > 100 for name in names)
    plots = [name for name in names if name.endswith(".png")]
    assert plots == ["distance.png", "loss.png", "curvature.png", "speed.png"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in plots)


def test_stores_of_another_order_are_refused_by_name(tmp_path: Path) -> None:
    found = inputs(tmp_path)
    found["pairs:nfm"] = store(tmp_path / "other", "nfm", rows=6)
    with pytest.raises(StageError, match=r"order keys \(independent \w{12}, nfm \w{12}\)"):
        compare.run(CONFIG, found, tmp_path, Recorder())


def test_variants_are_spelled_one_way_and_have_seeds_of_their_own() -> None:
    config = CompareConfig(couplings=(" nfm:soften=0.50", "independent@4+2"), seeds=(0, 1))
    assert config.couplings == ("nfm:soften=0.5", "independent@4+2")
    told = [f"{variant}@{seed}" for variant, seed in config.students()]
    assert told == ["nfm:soften=0.5@0", "independent@4", "nfm:soften=0.5@1", "independent@2"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"couplings": ("nmf",)}, "coupling 'nmf' is unknown"),
        ({"couplings": ("nfm", "nfm:soften=0")}, "nfm is named twice"),
        ({"couplings": ("nfm@a",)}, "write the seeds of a variant as nfm@0"),
        ({"couplings": ("nfm@1+1",)}, "counts once"),
        ({"seeds": (0, 0)}, "counts once"),
        ({"seeds": (-1,)}, "from 0"),
        ({"seeds": ()}, "at least 1"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        CompareConfig(**fields)
