"""What does not work where the artifacts are in a bucket. It is refused by name before anything is done."""

from __future__ import annotations

from collections.abc import Iterable

from nfm.pipeline.artifacts.artifact import artifacts_root
from nfm.stages.base import Section
from nfm.storage.errors import NoPlace
from nfm.storage.files.paths import is_remote


def check_settings(sections: Iterable[tuple[str, Section]], processes: int) -> None:
    """Raises NoPlace for a training by workers of Ray, which keep their checkpoints on a disk that all of them see.

    `processes` of a launcher train in place of such workers. `workers` of a stage with an executor encode.
    """
    if not is_remote(root := artifacts_root()) or processes > 1:
        return
    for name, section in sections:
        if (workers := getattr(section, "workers", 1)) > 1 and not hasattr(section, "executor"):
            raise NoPlace(
                str(root), f"{name}.workers = {workers} does not work in a bucket; start several processes by torchrun "
                f"or `nfm submit`, or --set {name}.workers=1, or name a folder", "NFM_ARTIFACTS=",
            )  # fmt: skip
