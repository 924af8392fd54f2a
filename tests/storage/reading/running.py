"""What a reader runs beside its consumer."""

from __future__ import annotations

import threading


def threads() -> list[threading.Thread]:
    """Our threads in this process."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("nfm-")]
