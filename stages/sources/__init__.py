"""Where images come from: a source lists its records (keys, labels, test flags) and loads rows as uint8 or floats."""

from nfm.stages.sources.digits import Digits
from nfm.stages.sources.folder import ImageFolder
from nfm.stages.sources.idx import Idx
from nfm.stages.sources.npz import Npz
from nfm.stages.sources.planar import Checkerboard, Gaussians, Planar
from nfm.stages.sources.source import Loaded, Source

__all__ = ["Checkerboard", "Digits", "Gaussians", "Idx", "ImageFolder", "Loaded", "Npz", "Planar", "Source"]
