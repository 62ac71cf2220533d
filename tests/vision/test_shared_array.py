"""Arrays in shared memory: who holds their descriptors, and until when."""

import os
import weakref

import numpy as np
import pytest

from vision.shared_array import SharedArray


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_duplicates_have_one_descriptor_which_is_closed_with_the_last_of_them() -> None:
    before = num_descriptors()
    array = SharedArray.copy_of(np.arange(6, dtype=np.uint8).reshape(2, 3))
    copies = [array.duplicate() for _ in range(100)]
    assert num_descriptors() == before + 1

    array.close()
    array.close()
    copies[0].numpy()[0, 0] = 9

    assert array.fd == -1
    assert copies[-1].numpy().tolist() == [[9, 1, 2], [3, 4, 5]]
    copies.clear()
    assert num_descriptors() == before


def test_what_duplicates_belong_to_is_there_until_the_last_of_them_is_closed() -> None:
    class Whole:
        pass

    array, whole = SharedArray.create((1,), "uint8"), Whole()
    is_there = weakref.ref(whole)
    first = array.duplicate(belongs_to=whole)
    second = first.duplicate(belongs_to="what is gone sooner")
    del whole

    first.close()
    assert is_there()
    second.close()

    assert not is_there()


def test_a_closed_array_has_no_duplicates() -> None:
    array = SharedArray.create((1,), "uint8")
    array.close()

    with pytest.raises(OSError, match="closed"):
        array.duplicate()
