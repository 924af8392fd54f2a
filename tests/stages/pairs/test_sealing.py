"""The coupling report that a store gets when it is sealed: stopped, killed, failing, or left out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nfm.stages.base import Stopped
from nfm.stages.pairs import sealing, stage
from nfm.storage.files import atomic
from tests.stages.pairs.shop import Heard, Shop


def test_a_sealed_generation_has_a_coupling_report_where_its_inputs_are_there(shop: Shop) -> None:
    config = shop.config(coupling="minibatch-ot", group_size=16)
    out = shop.begin(config)
    result = stage.run(config, shop.of(config), out, shop.heard)
    assert {"auc", "transport_cost", "exact", "approximate"} <= set(result.extra["coupling_report"])
    without = stage.seal(out, 2)
    assert "coupling_report" not in without.extra
    assert without.content_digest == result.content_digest


class Interrupted(Heard):
    """Interrupted for good at the first look, as by a second Ctrl-C."""

    @property
    def stopping(self) -> bool:
        raise KeyboardInterrupt


@pytest.fixture
def encoded(shop: Shop) -> Path:
    """A store with all commits and no manifest."""
    out = shop.begin(config := shop.config(coupling="independent"))
    stage.run(config, shop.of(config), out, shop.heard)
    return out


def sealed(shop: Shop, out: Path, heard: Heard, device: str = "auto") -> tuple[bool, str]:
    """(whether there is a coupling report, what was said) of a sealing."""
    result = stage.seal(out, 2, {}, shop.inputs, heard, device)
    assert result.content_digest == stage.seal(out, 2).content_digest
    return "coupling_report" in result.extra, " ".join(heard.said)


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
def test_a_report_that_was_stopped_is_made_by_the_same_command(
    shop: Shop, encoded: Path, error: type[BaseException]
) -> None:
    heard = Heard() if error is Stopped else Interrupted()
    heard.patience = 3
    with pytest.raises(error):
        sealed(shop, encoded, heard)
    assert "the same command makes it and seals the pairs" in " ".join(heard.said)
    assert not list(encoded.glob("manifest.*"))
    assert sealed(shop, encoded, Heard())[0]


def test_a_report_that_was_killed_is_not_made_again_so_that_the_manifest_comes(shop: Shop, encoded: Path) -> None:
    content = stage.seal(encoded, 2).content_digest
    atomic.write_json(encoded / sealing.BEGUN, {"content_digest": content})
    reported, said = sealed(shop, encoded, Heard())
    assert not reported
    assert "one was begun before and did not come to its end; `nfm pairs report`" in said
    (encoded / sealing.BEGUN).unlink()
    assert sealed(shop, encoded, Heard())[0]
    assert not (encoded / sealing.BEGUN).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device that is not there is a CUDA one")
def test_a_report_that_fails_is_told_with_the_reason_and_is_made_on_the_configs_device(
    shop: Shop, encoded: Path
) -> None:
    reported, said = sealed(shop, encoded, Heard(), "cuda")
    assert not reported
    assert "which failed: Unfit: device = 'cuda': torch sees no CUDA device" in said


def test_a_node_without_torch_seals_and_says_so(shop: Shop, encoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    reported, said = sealed(shop, encoded, Heard())
    assert not reported
    assert "without a coupling report: torch is not installed here" in said


def test_a_store_may_be_made_without_a_report(shop: Shop) -> None:
    config = shop.config(coupling="independent", report=False)
    assert config.semantic() == shop.config(coupling="independent").semantic()
    assert "coupling_report" not in stage.run(config, shop.inputs, shop.begin(config), shop.heard).extra
