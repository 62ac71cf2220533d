import threading

import pytest
import torch
from torch import nn

from engine.encoding import EmbeddingCache, Encoding, choose_batch
from tests.engine.fake_encoder import HIDDEN_SIZE, NUM_TOKENS, FakeEncoder, SteppingClock, fake_image

CPU = torch.device("cpu")
FOREVER_S = 1e9


def test_a_small_budget_computes_some_layers_at_a_time():
    encoder = FakeEncoder(num_layers=5)
    encoding = Encoding(encoder, [fake_image(7)], CPU, now_s=SteppingClock())

    progress = []
    while not encoding.is_done:
        encoding.run(3.0)
        progress.append(encoder.num_layers_done)

    assert progress == sorted(progress)
    assert len(set(progress)) > 2
    assert torch.equal(encoding.result[0], torch.full((NUM_TOKENS, HIDDEN_SIZE), 7.0))


def test_pauses_are_at_the_operators_of_a_layer():
    encoder = FakeEncoder()
    encoder.layers = [nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity()) for _ in range(2)]
    encoding = Encoding(encoder, [fake_image(7)], CPU, now_s=SteppingClock())

    num_slices = 0
    while not encoding.is_done:
        encoding.run(2.0)
        num_slices += 1

    assert num_slices > 2 * 2  # more than layers


def test_the_tower_computes_where_the_caller_does():
    """In one thread: each thread that calls operators has a team of computing threads, and two teams on the same cores wait asleep."""
    encoder = FakeEncoder()
    threads, modes = set(), set()
    for layer in encoder.layers:
        layer.register_forward_hook(lambda *_: (threads.add(threading.get_ident()), modes.add(torch.is_inference_mode_enabled())))
    encoding = Encoding(encoder, [fake_image(7)], CPU, now_s=SteppingClock())

    outside = []
    while not encoding.is_done:
        encoding.run(2.0)
        outside.append(torch.is_inference_mode_enabled())

    assert threads == {threading.get_ident()}
    assert modes == {True}
    assert len(outside) > 2
    assert not any(outside)


def test_a_large_budget_computes_all_at_once():
    encoding = Encoding(FakeEncoder(), [fake_image(1), fake_image(2)], CPU)

    encoding.run(FOREVER_S)

    assert [float(rows[0, 0]) for rows in encoding.result] == [1.0, 2.0]


def test_a_cancelled_encoding_computes_no_further_layer():
    encoder = FakeEncoder()
    encoding = Encoding(encoder, [fake_image(1)], CPU, now_s=SteppingClock())
    encoding.run(2.0)
    encoding.run(2.0)
    num_done = encoder.num_layers_done

    encoding.cancel()

    assert encoder.num_layers_done == num_done < len(encoder.layers)
    assert not encoding.is_done
    assert not any(layer._forward_pre_hooks for layer in encoder.layers)


def test_a_cancelled_encoding_leaves_the_thread_as_it_was():
    encoder = FakeEncoder()
    encoder.encode = torch.inference_mode()(encoder.encode)
    encoding = Encoding(encoder, [fake_image(1)], CPU, now_s=SteppingClock())
    encoding.run(2.0)
    encoding.run(2.0)

    encoding.cancel()

    assert 0 < encoder.num_layers_done < len(encoder.layers)
    assert not torch.is_inference_mode_enabled()


def test_an_encoding_that_was_never_run_can_be_cancelled():
    encoder = FakeEncoder()
    Encoding(encoder, [fake_image(1)], CPU).cancel()

    assert encoder.batch_sizes == []


def test_a_failure_is_kept_for_the_engine(caplog):
    encoder = FakeEncoder()
    encoder.failure = RuntimeError("bad picture")
    encoding = Encoding(encoder, [fake_image(1)], CPU)

    encoding.run(FOREVER_S)

    assert encoding.is_done
    assert encoding.error is encoder.failure
    assert encoding.error.__traceback__ is None  # whose frames would keep the batch's tensors


def test_a_wrong_number_of_rows_is_a_failure(caplog):
    encoding = Encoding(FakeEncoder(), [fake_image(1, num_tokens=NUM_TOKENS + 1)], CPU)

    encoding.run(FOREVER_S)

    assert isinstance(encoding.error, ValueError)


def test_a_batch_takes_pictures_of_the_first_ones_shape_in_order():
    images = [fake_image(1), fake_image(2, side=3), fake_image(3)]

    assert choose_batch(FakeEncoder(), images) == [images[0], images[2]]


def test_a_batch_is_bounded_in_tokens_but_takes_one_picture_of_any_size():
    large = fake_image(1, num_tokens=5000)

    assert choose_batch(FakeEncoder(), [large, fake_image(2)]) == [large]
    assert len(choose_batch(FakeEncoder(), [fake_image(i, num_tokens=1000) for i in range(4)])) == 2


def test_a_batch_is_bounded_in_pixels_where_larger_ones_only_keep_pictures_waiting():
    images = [fake_image(i, side=8) for i in range(4)]

    assert choose_batch(FakeEncoder(), images, max_pixels=2 * 64) == images[:2]
    assert choose_batch(FakeEncoder(), images, max_pixels=1) == images[:1]


def test_the_cache_forgets_the_least_recently_used_but_nothing_pinned():
    cache = EmbeddingCache(limit_bytes=2 * 16)
    for name in (b"a", b"b", b"c", b"d"):
        cache.add(name, torch.zeros(4))
    assert cache.touch(b"a")

    forgotten = cache.shrink(pinned={b"b"})

    assert forgotten == [b"c", b"d"]
    assert not cache.touch(b"c")
    assert cache.num_bytes == 32


@pytest.mark.parametrize("name", [b"x", b"y"])
def test_the_cache_knows_nothing_it_was_not_given(name):
    assert not EmbeddingCache(limit_bytes=10).touch(name)
