"""A numpy array in anonymous shared memory, passed between processes as a file descriptor.

The memory has no name: it cannot collide, be guessed or be left behind, and goes when the last descriptor and mapping are closed.
Knows nothing of sockets: who sends the descriptor is up to the caller.
"""

import errno
import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np


class _Descriptor:
    """Closed when no array has it any more, in whatever thread that is."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class SharedArray:
    """`shape` and `dtype` over a file descriptor that this object and its duplicates own; given up by `close()` or when collected."""

    def __init__(self, fd: int, shape: Sequence[int], dtype: str) -> None:
        """fd: below 0 for an array whose descriptor was lost on its way."""
        self._descriptor = _Descriptor(fd) if fd >= 0 else None
        self._belongs_to: object = None
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
    def fd(self) -> int:
        """-1 without one, and after `close()`."""
        return self._descriptor.number if self._descriptor is not None else -1

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

    def duplicate(self, *, belongs_to: object = None) -> "SharedArray":
        """The same memory by the same descriptor, closed for itself: it takes none of the few that a process has.

        belongs_to: kept alive until the duplicate and all duplicates of that are closed; what this one belongs to already takes its place.
        """
        if self._descriptor is None:
            raise OSError(errno.EBADF, "the array is closed")
        other = SharedArray(-1, self.shape, self.dtype.name)
        other._descriptor = self._descriptor
        other._belongs_to = self._belongs_to or belongs_to
        return other

    def close(self) -> None:
        self._descriptor = self._belongs_to = None


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("vlm-pixels", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # unlinked already
        return os.dup(file.fileno())
