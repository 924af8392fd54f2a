"""`python -m benchmarks.train` trains ours with and without peers, and runs a peer's loop as its script has it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from benchmarks.train.cases import SIZES
from benchmarks.train.checkouts import Script, module, stand_ins
from benchmarks.train.command import targets, train
from benchmarks.train.rows import check_same, measure
from benchmarks.train.sit import weights
from nfm.stages.base import Unfit
from nfm.stages.trained.devices.timing import random_batch
from nfm.trainers.models.tarflow import MetaBlock

CASE = SIZES["tiny"][0]
QUICK = ["--sizes", "tiny", "--rounds", "1", "--seconds", "0.001", "--threads", "1"]


class Peer:
    """A training of our own model that counts its steps."""

    stand_ins = ()

    def __init__(self, extra: int = 0, added: float = 0.0) -> None:
        self.model = nn.ModuleList([CASE.trial.make()[0], nn.Linear(extra, 1)] if extra else [CASE.trial.make()[0]])
        self.steps, self.added = 0, added

    def train(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        for image, label in batches:
            assert len(image) == len(label) == CASE.config.batch_size
            self.steps += 1

    def losses(self, image: Tensor, label: Tensor) -> tuple[float, float]:
        return 1.0, 1.0 + self.added


def test_one_command_trains_ours_where_no_peer_is_given(tmp_path: Path) -> None:
    output = tmp_path / "tiny.json"
    result = CliRunner().invoke(train, [*QUICK, "--only", "teacher", "-o", str(output)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    body = json.loads(output.read_text())
    assert body["peers"] == {"tarflow": "not given", "sit": "not given"}
    row = body["cases"]["teacher"]
    assert row["theirs"] == "not given"
    assert row["ours"]["images_per_second"] > 0
    assert "not given" in result.output
    assert str(tmp_path) not in output.read_text()


def test_both_take_the_same_number_of_steps_in_every_round() -> None:
    peer = Peer()
    row = measure(CASE, lambda: peer, 3, 0.001, "cpu", compiled=False)
    assert peer.steps == 3 + 3 * row["steps_a_round"]
    assert row["lowest"] <= row["ours_over_theirs"] <= row["highest"]


def test_what_a_device_has_no_memory_for_leaves_the_others_their_figures() -> None:
    def full(module: nn.Module, *_: object) -> None:
        if isinstance(module, MetaBlock):
            raise torch.OutOfMemoryError

    with torch.nn.modules.module.register_module_forward_pre_hook(full):
        found = CliRunner().invoke(train, QUICK, catch_exceptions=False)
    assert "teacher: the device has too little memory for both: give a smaller --batch" in found.output
    assert "student  4      float32" in found.output


@pytest.mark.parametrize(("peer", "told"), [(Peer(extra=2), "weights"), (Peer(added=0.01), "loss 1.0, ours 1.01")])
def test_another_model_is_not_measured(peer: Peer, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_same(CASE, peer, random_batch(4, CASE.facts, "cpu"))


def test_a_scripts_loop_and_functions_run_on_another_device(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import nothing_that_is_here\n"
        "def main():\n"
        "    def doubled(x):\n"
        "        return torch.full((1,), 2.0, device='cuda') * x\n"
        "    for x in source:\n"
        "        seen.append(doubled(x.cuda()))\n"
        "main()\n"
    )
    script = Script(tmp_path, "cpu")
    names: dict[str, object] = {"torch": torch, "seen": []}
    script.define("doubled", names)
    exec(script.loop("source"), {**names, "source": [torch.ones(1), torch.ones(1)]})
    assert names["seen"] == [2.0, 2.0]
    with pytest.raises(Unfit, match="loop over other"):
        script.loop("other")


def test_packages_that_are_not_here_seem_to_be_while_a_peer_is_imported(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text(
        "from absent_package.deep import Name\nclass Mine(Name):\n    one = Name.CHOICE\n"
    )
    with stand_ins("absent_package", "json") as missing:
        found = module(tmp_path, "part")
    assert missing == ["absent_package"]
    assert found.Mine.one is not None
    with pytest.raises(Unfit, match="absent_package, which is not installed"):
        module(tmp_path, "part")
    with pytest.raises(Unfit, match=r"no other\.py"):
        module(tmp_path, "other")


def test_every_weight_of_the_other_student_has_a_place_in_ours() -> None:
    ours = SIZES["tiny"][1].trial.make()[0].state_dict()
    named = {"attn.qkv": "qkv", "attn.proj": "project", "mlp.fc1": "expand", "mlp.fc2": "contract"}
    theirs = {
        f"blocks.{number}.{name}.{kind}": ours[f"blocks.{number}.{own}.{kind}"]
        for number in range(2) for name, own in named.items() for kind in ("weight", "bias")
    }  # fmt: skip
    head = torch.arange(48.0).reshape(16, 3)  # of 2x2 pixels of four channels, the channels of a pixel together
    found = weights({**theirs, "final_layer.linear.weight": head, "pos_embed": head}, patch=2)
    assert {name: tuple(value.shape) for name, value in found.items() if name != "head.weight"} == {
        name: tuple(ours[name].shape) for name in found if name != "head.weight"
    }
    assert found["head.weight"][:4, 0].tolist() == [0, 12, 24, 36]  # the first channel of all four pixels


def test_the_papers_sizes_are_those_of_the_config() -> None:
    sections = tomllib.loads(Path("configs/imagenet64.toml").read_text("utf-8"))
    for case, section, names in zip(
        SIZES["paper"], ("teacher", "student"), (("patch", "channels", "blocks", "layers"), ("patch", "width", "depth"))
    ):
        assert case.image_shape == (3, 64, 64)
        assert {name: getattr(case.config, name) for name in names} == {name: sections[section][name] for name in names}


def test_targets_are_of_both_and_on_a_gpu_of_its_rate() -> None:
    row = {"precision": "bfloat16", "ours": {"of_matrix_rate": 0.44}, "ours_over_theirs": 1.02}
    lines = targets({"machine": {"device": "some GPU"}, "cases": {"a": row}})
    assert [(line["measured"], line["met"]) for line in lines] == [(1.02, True), (0.44, False)]
    assert len(targets({"machine": {"device": "cpu"}, "cases": {"a": row}})) == 1


def test_wrong_use_is_told(tmp_path: Path) -> None:
    runner = CliRunner()
    assert "there are teacher, student" in runner.invoke(train, ["--sizes", "tiny", "--only", "x"]).output
    found = runner.invoke(train, ["--sizes", "tiny", "--tarflow", str(tmp_path)]).exception
    assert isinstance(found, Unfit)
    assert "there is no transformer_flow.py" in str(found)
