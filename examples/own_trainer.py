"""Your own student, fed from a pair store: `python examples/own_trainer.py artifacts/pairs/<fingerprint>`.

Any network that maps (x_t, t, label) to a velocity will do; this one is a line long. It needs `nfm.storage` alone.
"""

import sys

import torch

from nfm.storage import PairStore


def main(path: str, steps: int = 200) -> float:
    """Train a linear velocity for some steps; returns the last loss."""
    store = PairStore.open(path)
    size = store.spec.image_shape[0] * store.spec.image_shape[1] * store.spec.image_shape[2]
    model = torch.nn.Linear(size + 1, size)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step, batch in enumerate(store.batches(batch_size=128, seed=0, epochs=None, device="cpu")):
        t = torch.rand(len(batch.image), 1)
        image, noise = batch.image.flatten(1), batch.noise.flatten(1)
        velocity = model(torch.cat([(1 - t) * image + t * noise, t], dim=1))
        loss = (velocity - (noise - image)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == steps:
            break
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main(sys.argv[1]):.4f}")
