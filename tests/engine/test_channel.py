import asyncio
import os
import socket
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from engine.channel import AsyncSender, Channel, read_frame
from vision.shared_array import SharedArray


class Note(msgspec.Struct, tag=True):
    text: str
    arrays: dict[str, SharedArray] = {}


class Other(msgspec.Struct, tag=True):
    number: int


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    left, right = socket.socketpair()
    pair = Channel(left, Note | Other), Channel(right, Note | Other)
    yield pair
    for channel in pair:
        channel.close()


def array(value: int) -> SharedArray:
    return SharedArray.copy_of(np.full((2, 3), value, dtype=np.uint8))


def test_messages_arrive_whole_and_in_order(channels):
    left, right = channels
    for message in (Note("first"), Other(2), Note("x" * 100_000)):
        left.send(message)

    received = [right.receive(5.0) for _ in range(3)]

    assert received == [Note("first"), Other(2), Note("x" * 100_000)]


def test_nothing_there_is_none_after_the_timeout(channels):
    assert channels[0].receive(0.0) is None


def test_more_arrays_than_the_kernel_takes_at_once_arrive_in_their_places(channels):
    left, right = channels
    left.send(Note("many", {str(i): array(i % 251) for i in range(450)}))
    left.send(Note("one", {"last": array(7)}))

    many, one = right.receive(5.0), right.receive(5.0)

    assert all((many.arrays[str(i)].numpy() == i % 251).all() for i in range(450))
    assert one.arrays["last"].numpy().tolist() == [[7, 7, 7], [7, 7, 7]]


def test_received_arrays_share_their_memory_with_the_senders(channels):
    left, right = channels
    ours = array(1)
    left.send(Note("shared", {"a": ours}))
    theirs = right.receive(5.0).arrays["a"].numpy()

    ours.numpy()[0, 0] = 99

    assert theirs[0, 0] == 99


def test_a_closed_end_is_an_end_of_file_for_both_directions(channels):
    left, right = channels
    left.close()

    with pytest.raises(EOFError):
        right.receive(5.0)
    with pytest.raises(EOFError):
        right.send(Note("to nobody"))


def test_a_value_that_is_no_plain_message_is_refused(channels):
    with pytest.raises(TypeError, match="cannot be sent"):
        channels[0].send(Note(object()))


def test_closing_a_message_s_arrays_leaves_no_descriptor_behind(channels):
    left, right = channels
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        ours = array(1)
        left.send(Note("once", {"a": ours}))
        ours.close()
        right.receive(5.0).arrays["a"].close()

    assert len(os.listdir("/proc/self/fd")) == before


async def test_an_event_loop_sends_to_a_blocking_end_that_reads_slowly():
    ours, theirs = socket.socketpair()
    slow = Channel(theirs, Note | Other)
    sender = AsyncSender(ours)
    messages = [Note(str(i) * 50_000, {"a": array(i)}) for i in range(20)]

    sending = asyncio.gather(*(sender.send(message) for message in messages))
    received = [await asyncio.to_thread(slow.receive, 5.0) for _ in messages]
    await sending

    assert [note.text for note in received] == [message.text for message in messages]
    assert [int(note.arrays["a"].numpy()[0, 0]) for note in received] == list(range(20))
    sender.close()
    slow.close()


async def test_a_frame_whose_sender_is_cancelled_half_way_does_not_garble_the_next():
    ours, theirs = socket.socketpair()
    slow = Channel(theirs, Note | Other)
    sender = AsyncSender(ours)
    large = Note("x" * 5_000_000, {"a": array(1)})
    sending = asyncio.create_task(sender.send(large))
    await asyncio.sleep(0)  # the first bytes are on their way, the socket's buffer is far too small for all
    await asyncio.sleep(0)

    sending.cancel()
    following = asyncio.create_task(sender.send(Note("next", {"a": array(2)})))
    first, second = [await asyncio.to_thread(slow.receive, 5.0) for _ in range(2)]
    await following

    assert sending.cancelled()
    assert (first.text, second.text) == (large.text, "next")
    assert [int(note.arrays["a"].numpy()[0, 0]) for note in (first, second)] == [1, 2]
    sender.close()
    slow.close()


async def test_an_event_loop_reads_the_frames_of_a_blocking_end():
    ours, theirs = socket.socketpair()
    blocking = Channel(theirs, Note | Other)
    reader, writer = await asyncio.open_connection(sock=ours)
    blocking.send(Other(5))
    blocking.close()

    assert msgspec.msgpack.decode(await read_frame(reader), type=Note | Other) == Other(5)
    with pytest.raises(asyncio.IncompleteReadError):
        await read_frame(reader)
    writer.close()


async def test_closing_fails_what_is_still_being_sent():
    """A loop forgets a closed socket: without this its senders would wait for ever."""
    left, right = socket.socketpair()
    sender = AsyncSender(left)
    sendings = [asyncio.create_task(sender.send(Note("x" * 10_000_000))) for _ in range(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    sender.close()

    results = await asyncio.wait_for(asyncio.gather(*sendings, return_exceptions=True), 10)
    assert [isinstance(result, OSError) for result in results] == [True, True]
    right.close()


async def test_descriptors_that_are_closed_while_their_frame_waits_arrive_nonetheless():
    """A number that is free again may be another file's by the time it is sent."""
    left, right = socket.socketpair()
    sender, receiver = AsyncSender(left), Channel(right, Note)
    first = asyncio.create_task(sender.send(Note("x" * 10_000_000)))
    picture = array(7)
    second = asyncio.create_task(sender.send(Note("picture", {"pixels": picture})))
    for _ in range(3):  # both are begun, and the second one waits
        await asyncio.sleep(0)

    picture.close()
    usurper = array(9)
    received = [await asyncio.to_thread(receiver.receive, 10.0) for _ in range(2)]

    await asyncio.gather(first, second)
    assert received[1].arrays["pixels"].numpy().tolist() == [[7, 7, 7], [7, 7, 7]]
    usurper.close()
    sender.close()
    receiver.close()
