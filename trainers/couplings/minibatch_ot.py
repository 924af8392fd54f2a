"""Minibatch optimal transport: in each group of images of one class, the noises are assigned again to the images.

The assignment has the smallest sum of squared distances (Pooladian et al. 2023, arXiv 2304.14772; Tong et al. 2023,
arXiv 2302.00482).
"""

import numpy as np
import torch
from torch import Tensor

from nfm.trainers.couplings.coupling import Pairs, Scope


class MinibatchOT:
    """Exact assignment within groups of one class. The noises of a group are its eps, permuted.

    So over all groups z is as Gaussian as eps, and every image occurs once. Within a group the pairs are optimal. The
    approximation is the size of the groups: the smaller they are, the more the pairs are like independent ones.
    """

    name = "minibatch-ot"
    scope: Scope = "shard"

    def __init__(self, group_size: int) -> None:
        """`group_size`: the largest number of noises in a group. Time grows with its cube, memory with its square."""
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
    """The positions [n_g] of the members of each group, ascending. A group has one class and at most `group_size`
    members.

    The groups of a class have nearly the same size. Data without classes (every label -1) is one class.
    """
    found = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        found += np.array_split(members, -(-len(members) // group_size))
    return found


def assignment(images: Tensor, noises: Tensor) -> np.ndarray:
    """int64 [n]: the noise of each image, both [n, ...], such that sum |x_i - z_i|^2 is minimal.

    |x - z|^2 = |x|^2 + |z|^2 - 2 <x, z>, and the sums of the first two are the same for every permutation. Products are
    in float64. The order of sums differs between machines and numbers of threads; with float64 it does not matter if
    the optimum is unique. Equal images can exchange their noises at the same cost, so they get them in ascending order.
    """
    from scipy.optimize import linear_sum_assignment

    products = images.flatten(1).double() @ noises.flatten(1).double().T
    chosen = linear_sum_assignment(products.numpy(), maximize=True)[1]
    for places in _equal(images.flatten(1).numpy()):
        chosen[places] = np.sort(chosen[places])
    return chosen


def _equal(images: np.ndarray) -> list[np.ndarray]:
    """The positions, ascending, of each two or more equal images of [n, d]. -0 equals 0, as in the products."""
    found: dict[bytes, list[int]] = {}
    for place, image in enumerate(images):
        found.setdefault((image + 0.0).tobytes(), []).append(place)
    return [np.array(places) for places in found.values() if len(places) > 1]
