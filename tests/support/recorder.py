"""The reporter of tests that call a stage in this process."""

from __future__ import annotations


class Recorder:
    """Remembers progress and what was said, and asks to stop after `patience` looks; nobody else has its lock."""

    def __init__(self, patience: int = 1_000_000):
        self.patience = patience
        self.seen: list[tuple[int, int, str]] = []
        self.said: list[str] = []

    @property
    def stopping(self) -> bool:
        self.patience -= 1
        return self.patience < 0

    @property
    def ending(self) -> bool:
        return self.patience < 0

    def check_lock(self) -> None: ...

    def progress(self, done: int, total: int, unit: str, workers: object = (), **figures: object) -> None:
        self.seen.append((done, total, unit))

    def say(self, text: str) -> None:
        self.said.append(text)

    def log(self, kind: str, **values: object) -> None: ...
