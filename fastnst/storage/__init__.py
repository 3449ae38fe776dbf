"""Atomic writes, durability, locks, checksums, the cache folder; none of it needs more than the least file system.

Read `files` first, then `durability`, `locks` and `cache`.
"""

from fastnst.storage.cache import NOWHERE, cache_folder, write_cached
from fastnst.storage.durability import sync_descriptor, sync_file, sync_folder
from fastnst.storage.files import (
    LOCK_NAME,
    ForeignFileError,
    StorageError,
    check_folder,
    is_leftover,
    make_folder,
    open_nonblocking,
    read_regular_file,
    remove_leftovers,
    sha256_of,
    storage_error,
    write_atomic,
    write_json,
)
from fastnst.storage.locks import LOCK_NAMES, lock_file, lock_run

__all__ = [
    "LOCK_NAME",
    "LOCK_NAMES",
    "NOWHERE",
    "ForeignFileError",
    "StorageError",
    "cache_folder",
    "check_folder",
    "is_leftover",
    "lock_file",
    "lock_run",
    "make_folder",
    "open_nonblocking",
    "read_regular_file",
    "remove_leftovers",
    "sha256_of",
    "storage_error",
    "sync_descriptor",
    "sync_file",
    "sync_folder",
    "write_atomic",
    "write_cached",
    "write_json",
]
