"""A process that reads generation 1 of a store: `reader.py STORE FOLDER [PAUSE]` prints a digest for every batch.

With PAUSE it creates FOLDER/paused in the middle of an epoch and goes on once FOLDER/go is there.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

from nfm.storage import PairStore

EPOCHS, BATCH, PAUSE_AT = 4, 32, 11


def main(store: str, folder: str, pause: bool) -> None:
    batches = PairStore.open(store, generation=1).batches(BATCH, seed=5, epochs=EPOCHS)
    for number, batch in enumerate(batches):
        content = b"".join(array.tobytes() for array in (batch.image, batch.noise, batch.label, batch.slot, batch.draw))
        print(hashlib.sha256(content).hexdigest())
        if pause and number == PAUSE_AT:
            Path(folder, "paused").touch()
            while not Path(folder, "go").exists():
                time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "pause" in sys.argv[3:])
