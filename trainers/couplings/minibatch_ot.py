"""Minibatch optimal transport: the noises of a group of images of one class are dealt out again among them, so that
the sum of squared distances is the least (Pooladian et al. 2023, arXiv 2304.14772; Tong et al. 2023, arXiv 2302.00482).
"""

import numpy as np
import torch
from torch import Tensor

from nfm.trainers.couplings.coupling import Pairs, Scope


class MinibatchOT:
    """Exact assignment within groups of one class; each group's noises are its eps, permuted.

    Over all groups z is therefore as Gaussian as eps is, and every image is there once; within a group the pairs are
    the optimal ones. What is approximate is the group: the fewer it has, the nearer the pairs are to independent ones.
    """

    name = "minibatch-ot"
    scope: Scope = "shard"

    def __init__(self, group_size: int) -> None:
        """`group_size`: the most noises that are dealt out together; time grows with its cube, memory its square."""
        if group_size < 1:
            raise ValueError(f"group_size = {group_size}: a group has at least one noise")
        self.group_size = group_size

    def __call__(self, images: Tensor, labels: Tensor, eps: Tensor) -> Pairs:
        noise, group = torch.empty_like(eps), torch.empty(len(eps), dtype=torch.int64)
        for members in groups(labels.numpy(), self.group_size):
            place = torch.from_numpy(members)
            noise[place] = eps[place][torch.from_numpy(assignment(images[place], eps[place]))]
            group[place] = int(members[0])
        return Pairs(noise, group=group)


def groups(labels: np.ndarray, group_size: int) -> list[np.ndarray]:
    """Places [n_g] of the members of each group, ascending: one class each, at most `group_size`, of a class alike.

    Data without classes (every label -1) is one class.
    """
    found = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        found += np.array_split(members, -(-len(members) // group_size))
    return found


def assignment(images: Tensor, noises: Tensor) -> np.ndarray:
    """int64 [n]: the noise of each image, both [n, ...], such that sum |x_i - z_i|^2 is the least.

    |x - z|^2 = |x|^2 + |z|^2 - 2 <x, z>, and the first two sum to the same for every permutation. Products are in
    float64, so that the order of sums, which differs between machines and numbers of threads, decides nothing where
    the optimum is unique. Equal images share out the same noises at the same cost: these they get in ascending order.
    """
    from scipy.optimize import linear_sum_assignment

    products = images.flatten(1).double() @ noises.flatten(1).double().T
    chosen = linear_sum_assignment(products.numpy(), maximize=True)[1]
    for places in _equal(images.flatten(1).numpy()):
        chosen[places] = np.sort(chosen[places])
    return chosen


def _equal(images: np.ndarray) -> list[np.ndarray]:
    """Places, ascending, of each two or more equal images of [n, d]; -0 is equal to 0, as it is in the products."""
    found: dict[bytes, list[int]] = {}
    for place, image in enumerate(images):
        found.setdefault((image + 0.0).tobytes(), []).append(place)
    return [np.array(places) for places in found.values() if len(places) > 1]
