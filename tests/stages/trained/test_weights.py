"""The moving averages of a student: kept where asked, chosen by name, the same however the training was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from nfm.pipeline.config import ConfigError, load
from nfm.stages.base import StageError, Stopped, Unfit
from nfm.stages.evaluation.config import EvaluateConfig
from nfm.stages.trained import sampling, student
from nfm.stages.trained.student import StudentConfig
from nfm.stages.trained.weights import Name, files_of, parse, read
from nfm.storage.files import atomic
from nfm.trainers import flow_matching, solvers
from tests.stages.trained.test_student import SHAPE, SIT, TINY, write_store
from tests.support.recorder import Recorder

# 24 steps of 16 pairs; a snapshot where a multiple of 40 was passed: after 48, 80, 128, ...
KEPT: dict[str, Any] = TINY | SIT | {"pairs": 380, "emas": [0.1, 0.05], "snapshots": 40}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"pairs": write_store(tmp_path_factory.mktemp("stores") / "nfm", "nfm", 0)}


def train(config: StudentConfig, inputs: dict[str, Path], out: Path, patience: int = 1_000_000) -> list[str]:
    """The payload."""
    out.mkdir(exist_ok=True)
    result = student.run(config, inputs, out, Recorder(patience))
    atomic.write_json(out / "manifest.json", {"metrics": result.metrics, "config": {"label_drop": 0.1}})
    return list(result.payload)


@pytest.fixture(scope="module")
def made(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("students") / "kept"
    train(StudentConfig(**KEPT), inputs, out)
    return out


def weights(folder: Path, ema: str | None) -> dict[str, torch.Tensor]:
    return read(folder, ema)[0]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_an_average_is_kept_at_the_end_and_wherever_a_snapshot_was_asked_for(made: Path) -> None:
    seen = [48, 80, 128, 160, 208, 240, 288, 320, 368]
    assert list(files_of(made)) == [Name(width, at) for at in (None, *seen) for width in (0.05, 0.1)]
    assert len(list((made / "snapshots").iterdir())) == 2 * len(seen)
    assert not same(weights(made, "0.05"), weights(made, "0.1"))
    assert not same(weights(made, "0.05"), weights(made, "0.05@48"))


def test_the_averages_are_part_of_what_was_made_and_change_nothing_else(
    made: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    assert train(StudentConfig(**KEPT), inputs, tmp_path / "again") == ["weights.safetensors", *files_of(made).values()]
    plain = {name: value for name, value in KEPT.items() if name not in ("emas", "snapshots")}
    assert train(StudentConfig(**plain), inputs, tmp_path / "plain") == ["weights.safetensors"]
    whole = (made / "weights.safetensors").read_bytes()
    assert whole == (tmp_path / "plain" / "weights.safetensors").read_bytes()
    assert not {"emas", "snapshots"} & StudentConfig(**plain).semantic().keys()


def test_a_training_that_was_stopped_keeps_the_same_averages_bit_for_bit(
    made: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    config = StudentConfig(**KEPT | {"save_every": 100})
    for _ in range(2):
        with pytest.raises(Stopped):
            train(config, inputs, tmp_path / "stopped", patience=9)
    train(config, inputs, tmp_path / "stopped")
    assert files_of(tmp_path / "stopped") == files_of(made)
    for file in files_of(made).values():
        assert (tmp_path / "stopped" / file).read_bytes() == (made / file).read_bytes(), file


def test_a_combination_of_snapshots_is_near_the_average_that_was_tracked(
    made: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    train(StudentConfig(**KEPT | {"emas": [0.07], "snapshots": None}), inputs, tmp_path / "tracked")
    tracked, combined = weights(tmp_path / "tracked", "0.07"), weights(made, "posthoc:0.07")

    def far(one: dict[str, torch.Tensor]) -> float:
        return max(float((one[name] - tracked[name]).abs().max()) for name in tracked)

    assert far(combined) < 0.1 * min(far(weights(made, "0.05")), far(weights(made, "0.1")))
    # Of a width that was tracked, it is that average.
    own, name = weights(made, "0.05"), "posthoc:0.05"
    assert max(float((weights(made, name)[key] - own[key]).abs().max()) for key in own) < 1e-5


def test_samples_are_those_of_the_average_that_was_chosen(made: Path) -> None:
    noise, labels = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    images = {}
    for ema in (None, "0.05", "0.1@48", "posthoc:0.08"):
        sampler = sampling.student_sampler(made, 3, "cpu", "float32", ema=ema)
        assert sampler.name == f"student-nfm-euler-3{'' if ema is None else f'-ema-{ema}'.replace(':', '-')}"
        with torch.no_grad():
            images[ema] = sampler.decode(noise, labels)
            expected = solvers.sample(flow_matching.velocity(student.load(made, ema=ema), labels), noise, 3, "euler")
        assert torch.equal(images[ema], expected)
    first, *others = images.values()
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("ema", "message"),
    [
        ("0.07", r"ema 0\.07: no such moving average; there are 0\.05, 0\.1, 0\.05@48, .* and 8 more"),
        ("0.05@50", r"ema 0\.05@50: no such moving average"),
        ("posthoc:0.28", r"posthoc:0\.28: the profile that the averages can make is wrong by .*%; name a width nearer"),
    ],
)
def test_an_average_that_is_not_there_is_refused_with_those_that_are(made: Path, ema: str, message: str) -> None:
    with pytest.raises(Unfit, match=message):
        student.load(made, ema=ema)


def test_a_student_without_averages_says_so(inputs: dict[str, Path], tmp_path: Path) -> None:
    train(StudentConfig(**TINY | SIT), inputs, tmp_path)
    for ema in ("0.05", "posthoc:0.05"):
        with pytest.raises(Unfit, match=r"no such moving average; student\.emas names none"):
            student.load(tmp_path, ema=ema)


@pytest.mark.parametrize("text", ["", "0", "0.3", "-0.05", "0.05@", "@50", "posthoc:0.05@50", "ema", "0.05 ", "1e-2"])
def test_a_text_that_names_no_average_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names no moving average; name one by its relative width"):
        parse(text)
    with pytest.raises(ValidationError, match="names no moving average"):
        EvaluateConfig(ema=text)


def test_a_name_has_one_spelling() -> None:
    assert [str(parse(text)) for text in (".10", "0.1", "0.050@007", "posthoc:.2")] == [
        "0.1", "0.1", "0.05@7", "posthoc:0.2",
    ]  # fmt: skip
    assert EvaluateConfig(ema="0.10").semantic()["ema"] == "0.1"
    assert "ema" not in EvaluateConfig().semantic()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emas": [0.05, 0.05]}, "emas names a width twice: 0.05, 0.05"),
        ({"snapshots": 100}, "snapshots are of the moving averages in emas, and there are none"),
        ({"emas": [0.3]}, "less than or equal to 0.28"),
        ({"emas": [0.0]}, "greater than or equal to 0.001"),
    ],
)
def test_averages_that_cannot_be_kept_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudentConfig(**options)


def test_an_evaluation_of_an_average_that_training_will_not_keep_is_refused_before_it(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        '[data]\nsource = "digits"\n[student]\npairs = 1000\nbatch_size = 128\nemas = [0.05, 0.1]\nsnapshots = 250\n'
    )
    for ema in ("0.1", "0.05@256", "0.05@512", "0.05@768", "0.05@1024", "posthoc:0.08"):
        assert load(config, [f"evaluate.ema={ema!r}"]).evaluate.ema == ema
    assert load(config, ["evaluate.ema=0.05"]).evaluate.ema == "0.05", "a width may be a number"
    for ema in ("0.07", "0.05@250", "0.05@1152", "posthoc:0.2"):
        with pytest.raises(ConfigError, match=f"evaluate.ema = {ema}: "):
            load(config, [f"evaluate.ema={ema!r}"])


def test_weights_that_are_not_the_manifests_are_refused_and_so_is_a_snapshot_that_was_lost(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "student"
    train(StudentConfig(**KEPT), inputs, out)
    names = [str(path.relative_to(out)) for path in sorted(out.rglob("*.safetensors"))]
    files = [{"path": name, "sha256": atomic.hash_file(out / name)[0]} for name in names]
    atomic.write_json(out / "manifest.json", atomic.read_json(out / "manifest.json") | {"files": files})
    assert same(weights(out, "0.05@368"), weights(out, "0.05@368"))
    end = atomic.read_json(out / "manifest.json")["metrics"]["pairs_seen"]
    assert same(weights(out, f"0.05@{end}"), weights(out, "0.05"))
    (out / "snapshots/ema-0.05@48.safetensors").unlink()
    for name in ("0.05@48", "posthoc:0.07"):
        with pytest.raises(StageError, match=r"ema-0\.05@48\.safetensors: .*missing"):
            weights(out, name)
    whole = (out / "weights.safetensors").read_bytes()
    (out / "weights.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StageError, match=r"weights\.safetensors: its SHA-256 is not the manifest's.*restore"):
        weights(out, None)
