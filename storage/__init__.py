"""Pair stores: written in whole shards, read at the speed of memory. Reading needs the base install only."""

from nfm.storage.dataset.images import ImageDataset
from nfm.storage.dataset.writer import DatasetWriter
from nfm.storage.errors import CorruptShard, MissingShard, NewerSchema, StateMismatch, StorageError
from nfm.storage.files.copies.cache import ShardCache
from nfm.storage.format.fields import Field
from nfm.storage.format.spec import StoreSpec
from nfm.storage.ledger.pair_writer import PairWriter
from nfm.storage.mixture import Mixture
from nfm.storage.reading.batch import Batch
from nfm.storage.reading.reader import BatchReader
from nfm.storage.store import PairStore

__all__ = [
    "Batch",
    "BatchReader",
    "CorruptShard",
    "DatasetWriter",
    "Field",
    "ImageDataset",
    "MissingShard",
    "Mixture",
    "NewerSchema",
    "PairStore",
    "PairWriter",
    "ShardCache",
    "StateMismatch",
    "StorageError",
    "StoreSpec",
]
