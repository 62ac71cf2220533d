"""A numpy array in anonymous shared memory, passed between processes as a file descriptor.

The memory has no name: it cannot collide, be guessed or be left behind, and goes when the last descriptor and mapping are closed.
Knows nothing of sockets: who sends the descriptor is up to the caller.
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np


class SharedArray:
    """`shape` and `dtype` over a file descriptor that this object owns; closed by `close()` or when collected."""

    def __init__(self, fd: int, shape: Sequence[int], dtype: str) -> None:
        self.fd = fd
        self.shape = tuple(shape)
        self.dtype = np.dtype(dtype)

    @classmethod
    def create(cls, shape: Sequence[int], dtype: str) -> "SharedArray":
        """Zeroed memory for the array."""
        array = cls(_anonymous_file(), (0,), dtype)
        array.resize(shape)
        return array

    @classmethod
    def copy_of(cls, source: np.ndarray[Any, Any]) -> "SharedArray":
        array = cls.create(source.shape, source.dtype.name)
        np.copyto(array.numpy(), source)
        return array

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def numpy(self) -> np.ndarray[Any, Any]:
        """A writable view of the memory; stays valid after `close()`.

        Raises ValueError where the memory is smaller than shape and dtype say.
        """
        if os.fstat(self.fd).st_size < self.num_bytes:
            raise ValueError(f"the shared memory holds fewer than the {self.num_bytes} bytes of {self.shape} {self.dtype.name}")
        memory = mmap.mmap(self.fd, max(1, self.num_bytes))
        return np.frombuffer(memory, self.dtype, count=int(np.prod(self.shape, dtype=np.int64))).reshape(self.shape)

    def resize(self, shape: Sequence[int]) -> None:
        """More or less memory, for an array of that shape."""
        self.shape = tuple(shape)
        os.ftruncate(self.fd, max(1, self.num_bytes))

    def duplicate(self) -> "SharedArray":
        """The same memory by another descriptor, which is closed for itself."""
        return SharedArray(os.dup(self.fd), self.shape, self.dtype.name)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("vlm-pixels", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # unlinked already
        return os.dup(file.fileno())
