"""Config fields for where a stage computes: what is right on no machine is refused, also if nothing is to be made."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from nfm.stages.trained.devices.machine import check_device

_CLUSTER = re.compile(r"(ray://)?[^\s/]+:(?P<port>\d{1,5})", re.ASCII)


def check_address(text: str) -> str:
    """The address of a Ray cluster; empty is none. Raises ValueError for text that is no address."""
    found = _CLUSTER.fullmatch(text)
    if text not in ("", "auto", "local") and not (found and 1 <= int(found["port"]) <= 65535):
        raise ValueError(
            "no address of a Ray cluster: write HOST:PORT with a port from 1 to 65535, for Ray's client with ray:// "
            "before it; or auto, or local"
        )
    return text


DeviceField = Annotated[str, AfterValidator(check_device)]
AddressField = Annotated[str, AfterValidator(check_address)]
