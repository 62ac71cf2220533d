import pytest
import torch
from transformers import LlamaConfig

from engine.config import EngineConfig
from engine.layers.parallel import split_range
from engine.model_runner import count_blocks, resolve_device, resolve_dtype
from engine.models.registry import UnsupportedModelError

MIB = 1 << 20
CPU = torch.device("cpu")


def blocks(share: float | None, *, free_bytes: int = 8 << 30, is_cuda: bool = False, block_bytes: int = MIB, **fields: int) -> int:
    config = EngineConfig(model_folder="", cache_max_entry_count=share, **{"session_len": 1600, "max_batch_size": 4, **fields})
    return count_blocks(config, block_bytes, free_bytes=free_bytes, is_cuda=is_cuda)


def test_on_a_cpu_the_cache_is_what_the_batch_can_use():
    assert blocks(None) == 4 * 100


def test_on_a_cpu_the_cache_takes_one_gibibyte_at_most():
    assert blocks(None, max_batch_size=64) == 1024


def test_on_a_cpu_the_cache_takes_no_more_than_is_free():
    assert blocks(None, free_bytes=50 * MIB) == 50


def test_on_cuda_the_cache_takes_four_fifths_of_the_free_memory():
    assert blocks(None, free_bytes=100 * MIB, is_cuda=True) == 80


def test_a_number_below_one_is_a_share_of_the_free_memory():
    assert blocks(0.5, free_bytes=100 * MIB) == 50


def test_a_number_from_one_on_is_a_number_of_blocks():
    assert blocks(1) == 1
    assert blocks(77) == 77


def test_a_rank_without_kv_heads_needs_no_memory():
    assert blocks(None, block_bytes=0) == 400


def test_a_cache_that_holds_nothing_is_refused_with_the_flag_s_name():
    with pytest.raises(UnsupportedModelError, match="--cache-max-entry-count"):
        blocks(0.001, free_bytes=100 * MIB)


def test_auto_dtype_is_float32_on_a_cpu_and_the_checkpoint_s_half_precision_on_cuda():
    cuda = torch.device("cuda", 0)
    assert resolve_dtype("auto", LlamaConfig(dtype="float16"), CPU) is torch.float32
    assert resolve_dtype("auto", LlamaConfig(dtype="float16"), cuda) is torch.float16
    assert resolve_dtype("auto", LlamaConfig(dtype="float32"), cuda) is torch.bfloat16
    assert resolve_dtype("bfloat16", LlamaConfig(), CPU) is torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused_and_auto_takes_the_cpu():
    assert resolve_device("auto", 0) == CPU
    with pytest.raises(UnsupportedModelError, match="no CUDA device"):
        resolve_device("cuda", 0)


@pytest.mark.parametrize(
    ("num_units", "size", "expected"),
    [(3, 2, [2, 1]), (3, 4, [1, 1, 1, 0]), (8, 4, [2, 2, 2, 2]), (49152, 5, [9831, 9831, 9830, 9830, 9830])],
)
def test_shards_are_whole_units_that_cover_all_in_order(num_units, size, expected):
    ranges = [split_range(num_units, rank, size) for rank in range(size)]

    assert [stop - start for start, stop in ranges] == expected
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
    assert (ranges[0][0], ranges[-1][1]) == (0, num_units)
