"""The table of student architectures."""

from __future__ import annotations

from typing import Any

import pytest

from nfm.stages.base import StageError
from nfm.stages.trained.architectures import build


@pytest.mark.parametrize("arch", ["dit", 3, ["sit"]])
def test_weights_of_an_architecture_that_is_not_known_are_refused_by_name(arch: Any) -> None:
    with pytest.raises(StageError, match=r"architecture .*, which is not known here; there are sit, unet"):
        build({"arch": arch, "image_shape": [1, 8, 8], "classes": 0, "width": 32, "depth": 1})
