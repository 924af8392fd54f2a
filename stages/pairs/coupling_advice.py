"""A coupling report for users: its figures as lines, and a sentence with a remedy for each bad one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nfm.stages.couplings.facts import facts_of

Report = Mapping[str, Any]
AUC = 0.6  # above this, a student's initial noise visibly differs from its store's
# Students on a teacher's noise were nearer to the data than those on semidiscrete transport where the AUC was at most
# this, with so many evaluations at most (docs/results.md, "Which coupling").
PAYS_AUC, PAYS_EVALUATIONS = 0.70, 5
CLOSE = 0.02  # so near that AUC, either may be ahead
OVERFITTED = 0.05  # nats per dimension between held-out and training rows
ERRORS = 5.0  # standard errors beyond which a figure is not chance
MOMENT = 0.05  # RMS over dimensions of a mean, or of a variance minus 1, beyond the effect of sampling
SCALES = (0.2, 3.0)  # root mean squares of images for which eta and the models' sizes are meant
UNEVEN = 0.05  # of chi^2, beyond the effect of sampling


def lines(report: Report) -> dict[str, str]:
    """The figures of the report by the names that users see, without those that could not be measured."""
    noise, expected = report["noise"], report["noise_expected"]
    found = {
        "measured": f"{report['pairs']:,} pairs of {report['shards']} shards",
        "transport cost": f"{report['transport_cost']:.4f} a dimension ({report['transport_cost_independent']:.4f} "
        "if paired at random)",
    }
    if report.get("auc") is not None:
        found["two-sample AUC"] = f"{report['auc']:.3f} +- {report['auc_error']:.3f} (0.5: no different from N(0, I))"
    for name, shown in (("mean", "mean"), ("var", "variance - 1"), ("kurtosis", "kurtosis - 3")):
        found[f"z {shown}"] = (
            f"RMS {noise[name]:.4f}, worst {noise[f'{name}_worst']:+.4f} over dimensions "
            f"({expected[name]:.4f}, {expected[f'{name}_worst']:+.4f} of fresh noise)"
        )
    found["z projections"] = (
        f"Kolmogorov-Smirnov {noise['ks_statistic']:.4f} ({expected['ks_statistic']:.4f} of fresh noise), "
        f"worst p {noise['ks_p']:.2g}"
    )
    if report["classes"]:
        worst = max(report["classes"], key=lambda row: row["var"] - row["expected"]["var"])
        found["z by class"] = (
            f"variance - 1 is RMS {worst['var']:.4f} ({worst['expected']['var']:.4f} of fresh noise) in the worst "
            f"class, {worst['label']}, of {len(report['classes'])}"
        )
    found |= _rows(report) | _nll(report)
    if (told := which_coupling(report)) is not None:
        found["likely best"] = told
    found["exact"] = "; ".join(report["exact"]) or "-"
    found["approximate"] = "; ".join(report["approximate"]) or "-"
    return found


def which_coupling(report: Report) -> str | None:
    """With how many evaluations a teacher's pairs are likely the best choice; None for pairs that no teacher made."""
    if (found := _better(report)) is None:
        return None
    few, where = f"with up to {PAYS_EVALUATIONS} evaluations", "(docs/results.md, of images of 64 to 784 values)"
    return {
        "transport": f"semidiscrete-ot, until a longer trained teacher has an AUC of at most {PAYS_AUC:.2f} {where}",
        "close": f"{few} this or semidiscrete-ot, close to each other at an AUC near {PAYS_AUC:.2f}; with more "
        f"semidiscrete-ot {where}",
        "teacher": f"{few} this, with more semidiscrete-ot {where}",
    }[found]


def _better(report: Report) -> str | None:
    """Whose pairs are better with few evaluations; None for pairs that no teacher made, or that were not judged."""
    auc = report.get("auc")
    if auc is None or _made_with(report) != "teacher":
        return None
    if abs(auc - PAYS_AUC) <= max(CLOSE, 2 * (report.get("auc_error") or 0.0)):
        return "close"
    return "transport" if auc > PAYS_AUC else "teacher"


def advice(report: Report) -> list[str]:
    """A sentence for each figure that is bad, with its remedy; empty when all is well."""
    of_all = (_of_scale, _of_auc, _of_mean, _of_variance, _of_nll, _of_rows)
    return [text for of_one in of_all if (text := of_one(report))]


def _rows(report: Report) -> dict[str, str]:
    rows = report.get("rows")
    if rows is None:
        return {}
    part = "" if rows["all_counted"] else f", counted over {rows['counted']:,} pairs"
    known = f"{rows['chi2_expected']:.4f} if drawn at random" if rows["chi2_expected"] else "0 of a whole store"
    lacking = f", {report['excluded']:,} pairs excluded" if report.get("excluded") else ""
    return {
        "image rows": f"paired {rows['fewest']} to {rows['most']} times, {rows['never']:.2%} never; chi^2 "
        f"{rows['chi2']:.4f} ({known}){part}{lacking}"
    }


def _nll(report: Report) -> dict[str, str]:
    if report.get("nll_train") is None:
        return {}
    heldout = report.get("nll_heldout")
    other = f", {heldout:.4f} +- {report['nll_heldout_error']:.4f} on held-out ones" if heldout is not None else ""
    return {"nll": f"{report['nll_train']:.4f} nats a dimension on training rows{other}"}


def _wrong_scale(report: Report) -> bool:
    """Whether the images are floats far from the scale of the noise. Older reports do not tell."""
    image = report.get("image", {"dtype": "uint8"})
    return image["dtype"] != "uint8" and not SCALES[0] <= image["size"] <= SCALES[1]


def _made_with(report: Report) -> str | None:
    return facts_of(str(report.get("coupling"))).made_with


def _of_scale(report: Report) -> str | None:
    if not _wrong_scale(report):
        return None
    image = report["image"]
    return (
        f"the images are {image['dtype']} from {image['low']:.4g} to {image['high']:.4g}, root mean square "
        f"{image['size']:.4g}, where teacher and student want about 1: if they are pixels, save them as uint8; of "
        "latents, divide by their standard deviation (and set data.image_scale to 1 over it); then make the data anew"
    )


def better_teacher(report: Report) -> str:
    """What to do if the noise of a teacher is not N(0, I)."""
    return "mend the images' scale first" if _wrong_scale(report) else "train the teacher longer"


def _of_auc(report: Report) -> str | None:
    auc, error = report.get("auc"), report.get("auc_error")
    if auc is None or error is None or auc - 0.5 < ERRORS * error:
        return None
    told = f"a classifier tells this noise from N(0, I), which students sample from: AUC {auc:.2f}, 0.5 is perfect"
    coupling = str(report.get("coupling"))
    if facts_of(coupling).gaussian:
        return f"{told}; noise of coupling {coupling} is N(0, I) as it is made: `nfm audit --deep` the store"
    if auc < AUC:
        return None
    mended = better_teacher(report) if _made_with(report) == "teacher" else _own(report)
    likely = {
        "transport": "; until then semidiscrete-ot is likely the better choice",
        "close": f"; semidiscrete-ot is likely as good, and better with more than {PAYS_EVALUATIONS} evaluations",
        "teacher": f"; with more than {PAYS_EVALUATIONS} evaluations semidiscrete-ot is likely the better choice",
    }.get(_better(report) or "", "")
    return f"{told}: {mended}, or soften the student (student.soften = 0.5){likely}"


def _of_mean(report: Report) -> str | None:
    return _of_moment(report, "mean", "mean differs from 0", "take its mean off")


def _of_variance(report: Report) -> str | None:
    return _of_moment(report, "var", "variance differs from 1", "divide it by its standard deviation")


def _of_moment(report: Report, name: str, what: str, remedy: str) -> str | None:
    found, expected = report["noise"][name], report["noise_expected"][name]
    if found <= MOMENT + 2 * expected:
        return None
    mended = better_teacher(report) if _made_with(report) == "teacher" else f"{_own(report)}, or {remedy}"
    return f"z's {what} by {found:.3f} (RMS over dimensions, {expected:.3f} from sampling alone): {mended}"


def _own(report: Report) -> str:
    """Who made noise that no teacher of ours made."""
    return "mend the custom function" if facts_of(str(report.get("coupling"))).code else "look at how the noise is made"


def _of_nll(report: Report) -> str | None:
    train, heldout = report.get("nll_train"), report.get("nll_heldout")
    if train is None or heldout is None:
        return None
    error = (report["nll_train_error"] ** 2 + report["nll_heldout_error"] ** 2) ** 0.5
    if heldout - train < max(OVERFITTED, ERRORS * error):
        return None
    return (
        f"the teacher is overfitted: {train:.3f} nats a dimension on its training rows, {heldout:.3f} on held-out "
        "ones, so that its noise of a training image is no sample of N(0, I): train it on fewer images "
        "(teacher.images), with teacher.flips or more teacher.eta, or on more data"
    )


def _of_rows(report: Report) -> str | None:
    rows = report.get("rows")
    if rows is None:
        return None
    excess = rows["chi2"] - rows["chi2_expected"]
    spread = rows["chi2_expected"] * (2 / max(rows["chi2_expected"] * rows["counted"], 1)) ** 0.5
    if excess < max(UNEVEN, ERRORS * spread):
        return None
    again = "run the pairs stage again to encode what is excluded"
    remedy = "fit the potential longer ([potential])" if _made_with(report) == "potential" else again
    return (
        f"images are paired unevenly: chi^2 {rows['chi2']:.3f} where "
        + (f"drawing at random gives {rows['chi2_expected']:.3f}" if rows["chi2_expected"] else "a whole store has 0")
        + f", {rows['never']:.1%} of the rows never: {remedy}"
    )
