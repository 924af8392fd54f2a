"""Where images come from: a source lists its records (keys, labels, test flags) and loads rows as uint8 or floats."""

from nfm.stages.data.source import Loaded, Source
from nfm.stages.data.sources.digits import Digits
from nfm.stages.data.sources.folder import ImageFolder
from nfm.stages.data.sources.idx import Idx
from nfm.stages.data.sources.npz import Npz
from nfm.stages.data.sources.planar import Checkerboard, Gaussians, Planar

__all__ = ["Checkerboard", "Digits", "Gaussians", "Idx", "ImageFolder", "Loaded", "Npz", "Planar", "Source"]
