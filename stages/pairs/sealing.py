"""Adds the coupling report when a store is sealed.

A store is complete without it, so no failure here may stop the seal.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from nfm.stages.base import Inputs, Reporter, Stopped
from nfm.storage import PairStore
from nfm.storage.files import atomic
from nfm.storage.files.paths import exists, remove
from nfm.storage.format.spec import read_spec
from nfm.storage.ledger import seal
from nfm.storage.ledger.generation import Generation

# Among the records of runs, which no audit takes for a part of the store. It remains if the report was killed.
BEGUN = "events/coupling-report.begun.json"
OPTIONAL = ("torch", "scipy")
LATER = "`nfm pairs report` measures the store at any time"


def of_sealing(
    out: Path, body: dict[str, Any], inputs: Inputs, report: Reporter | None, device: str = "auto"
) -> dict[str, dict[str, Any]]:
    """`{"coupling_report": ...}` for the manifest `body`; or nothing, after a message that says why.

    There is no report if torch or scipy is not installed, if the report fails, or if an earlier report of the same
    pairs never finished: it was killed for its memory or time, and would be again. Raises Stopped where the user stops
    it, before anything is sealed; the next seal then makes it.
    """
    if exists(seal.manifest_path(out, body["generation"])):  # sealed before: it stays as it is
        return {}
    mark, begun = out / BEGUN, {"content_digest": body["content_digest"]}
    if exists(mark) and atomic.read_json(mark).get("content_digest") == body["content_digest"]:
        _say(report, "sealed without a coupling report: one was begun before and did not come to its end")
        return {}
    try:
        atomic.write_json(mark, begun)
        from nfm.stages.pairs import coupling_report

        store = PairStore(Generation(out, read_spec(out), body["generation"], body))
        found = {"coupling_report": coupling_report.measure(store, inputs, report, device)}
    except (Stopped, KeyboardInterrupt):
        remove(mark)
        if report is not None:
            report.say("the coupling report was stopped before its end; the same command makes it and seals the pairs")
        raise
    except Exception as error:
        found = {}
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in OPTIONAL:
            _say(report, f"sealed without a coupling report: {error.name} is not installed here")
        else:
            _say(report, f"sealed without a coupling report, which failed: {type(error).__name__}: {error}")
            if report is not None:
                report.log("COUPLING_REPORT_FAILED", error=traceback.format_exc())
    remove(mark)
    return found


def _say(report: Reporter | None, text: str) -> None:
    if report is not None:
        report.say(f"{text}; {LATER}")
