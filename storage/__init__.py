"""Pair stores: written as commits of whole shards, read at memory speed; the base install is enough to read
one.
"""

from nfm.storage.batch import Batch
from nfm.storage.dataset import DatasetWriter, ImageDataset
from nfm.storage.errors import CorruptShard, MissingShard, NewerSchema, StateMismatch, StorageError
from nfm.storage.reader import BatchReader
from nfm.storage.schema import Field, StoreSpec
from nfm.storage.store import PairStore

__all__ = [
    "Batch",
    "BatchReader",
    "CorruptShard",
    "DatasetWriter",
    "Field",
    "ImageDataset",
    "MissingShard",
    "NewerSchema",
    "PairStore",
    "StateMismatch",
    "StorageError",
    "StoreSpec",
]
