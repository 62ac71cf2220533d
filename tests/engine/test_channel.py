import asyncio
import errno
import fcntl
import gc
import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest

import engine.channel
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


def values(note: Note) -> list[int]:
    return [int(each.numpy()[0, 0]) for each in note.arrays.values()]


@contextmanager
def room_for(num_descriptors: int) -> Iterator[None]:
    """So many more can be opened, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}
    taken = {fd for fd in taken if os.path.exists(f"/proc/self/fd/{fd}")}  # not the one that listed them
    limit = next(limit for limit in range(1, soft) if limit - sum(fd < limit for fd in taken) == num_descriptors)  # with 0 nothing polls
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def above_1023(sock: socket.socket) -> Iterator[socket.socket]:
    """The same socket by such a number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    try:
        with socket.socket(fileno=fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, 1024)) as high:
            yield high
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def failing_at(numbers: range, code: int) -> Callable[..., int]:
    """`socket.send_fds`, where the calls of these numbers fail."""
    send_fds, calls = socket.send_fds, iter(range(1000))

    def send(*args: object) -> int:
        if next(calls) in numbers:
            raise OSError(code, os.strerror(code))
        return send_fds(*args)

    return send


def test_messages_arrive_whole_and_in_order(channels):
    left, right = channels
    for message in (Note("first"), Other(2), Note("x" * 100_000)):
        left.send(message)

    received = [right.receive(5.0) for _ in range(3)]

    assert received == [Note("first"), Other(2), Note("x" * 100_000)]


def test_nothing_there_is_none_after_the_timeout(channels):
    assert channels[0].receive(0.0) is None


def test_a_socket_whose_number_is_above_1023_receives_as_others_do(channels):
    """Regression: an engine that a server with many connections started died of its socket's number."""
    left, right = channels
    with above_1023(right._socket) as sock:
        high = Channel(sock, Note)
        assert high.receive(0.0) is None

        left.send(Note("first"))
        assert high.receive(None) == Note("first")
        left.close()
        with pytest.raises(EOFError):
            high.receive(None)


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


async def test_the_number_of_a_socket_that_was_closed_while_it_sent_is_free_for_others():
    """Regression: asyncio's own loop still knew it, and could not watch the next socket of that number."""
    left, right = socket.socketpair()
    sender = AsyncSender(left)
    sending = asyncio.create_task(sender.send(Note("x" * 10_000_000)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    sender.close()
    loop = asyncio.get_running_loop()
    others = [*socket.socketpair(), *socket.socketpair()]
    for other in others:
        loop.add_reader(other, lambda: None)
        loop.remove_reader(other)
        other.close()

    with pytest.raises(BrokenPipeError):
        await sending
    assert left.fileno() == -1
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


def test_descriptors_that_there_is_no_room_for_are_lost_and_the_next_message_has_its_own(channels):
    left, right = channels
    left.send(Note("many", {str(i): array(i) for i in range(250)}))

    with room_for(3):
        many = right.receive(5.0)
    left.send(Note("next", {"a": array(7)}))
    following = right.receive(5.0)

    assert [each.fd >= 0 for each in many.arrays.values()] == [True] * 3 + [False] * 247
    assert values(following) == [7]


def test_a_message_that_came_without_any_of_its_descriptors_is_one_of_closed_arrays(channels):
    left, right = channels
    left.send(Note("lost", {"a": array(1)}))

    with room_for(0):
        lost = right.receive(5.0)
    left.send(Note("next", {"a": array(2)}))

    assert lost.arrays["a"].fd == -1
    assert values(right.receive(5.0)) == [2]


async def test_what_was_sent_of_a_frame_that_failed_is_nobodys(monkeypatch):
    ours, theirs = socket.socketpair()
    sender, receiver = AsyncSender(ours), Channel(theirs, Note)
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(socket, "send_fds", failing_at(range(1, 2), errno.ENOBUFS))

    with pytest.raises(OSError, match="buffer"):
        await sender.send(Note("given up", {str(i): array(i) for i in range(250)}))
    await sender.send(Note("next", {str(i): array(200 + i) for i in range(3)}))
    received = receiver.receive(5.0)

    assert (received.text, values(received)) == ("next", [200, 201, 202])
    del received
    gc.collect()  # the error's traceback
    assert len(os.listdir("/proc/self/fd")) == before
    sender.close()
    receiver.close()


async def test_who_has_too_many_descriptors_on_their_way_waits_and_lets_others_go_first(monkeypatch):
    ours, theirs = socket.socketpair()
    sender, receiver = AsyncSender(ours), Channel(theirs, Note)
    monkeypatch.setattr(socket, "send_fds", failing_at(range(1, 4), errno.ETOOMANYREFS))
    monkeypatch.setattr(engine.channel, "IN_FLIGHT_PAUSE_S", 0.0)

    await asyncio.gather(sender.send(Note("many", {str(i): array(i) for i in range(250)})), sender.send(Note("without pictures")))
    received = [receiver.receive(5.0) for _ in range(2)]

    assert [note.text for note in received] == ["without pictures", "many"]
    assert values(received[1]) == list(range(250))
    sender.close()
    receiver.close()


async def test_too_many_descriptors_for_too_long_are_an_error_and_the_channel_goes_on(monkeypatch):
    ours, theirs = socket.socketpair()
    sender, receiver = AsyncSender(ours), Channel(theirs, Note)
    monkeypatch.setattr(socket, "send_fds", failing_at(range(1), errno.ETOOMANYREFS))
    monkeypatch.setattr(engine.channel, "MAX_IN_FLIGHT_WAIT_S", 0.0)

    with pytest.raises(OSError) as caught:
        await sender.send(Note("refused", {"a": array(1)}))
    await sender.send(Note("next", {"a": array(2)}))

    assert caught.value.errno == errno.ETOOMANYREFS
    assert values(receiver.receive(5.0)) == [2]
    sender.close()
    receiver.close()


async def test_what_is_sent_in_order_is_refused_at_once_and_not_sent_after_what_follows(monkeypatch):
    ours, theirs = socket.socketpair()
    sender, receiver = AsyncSender(ours), Channel(theirs, Note)
    monkeypatch.setattr(socket, "send_fds", failing_at(range(1), errno.ETOOMANYREFS))

    notes = (Note("refused", {"a": array(1)}), Note("second"), Note("third", {"a": array(3)}))
    refused, *_ = await asyncio.gather(*(sender.send_in_order(note) for note in notes), return_exceptions=True)

    assert isinstance(refused, OSError)
    assert refused.errno == errno.ETOOMANYREFS
    assert [receiver.receive(5.0).text for _ in range(2)] == ["second", "third"]
    assert receiver.receive(0.0) is None
    sender.close()
    receiver.close()


async def test_half_a_payload_ends_the_channel(monkeypatch):
    ours, theirs = socket.socketpair()
    sender, receiver = AsyncSender(ours), Channel(theirs, Note)

    async def half(sock: socket.socket, data: bytes) -> None:
        sock.send(data[: len(data) // 2])
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_sendall", half)
    with pytest.raises(OSError, match="buffer"):
        await sender.send(Note("half"))

    with pytest.raises(EOFError):
        receiver.receive(5.0)
    sender.close()
    receiver.close()


async def test_a_message_whose_turn_has_not_come_goes_with_its_sender():
    ours, theirs = socket.socketpair()
    sender, receiver = AsyncSender(ours), Channel(theirs, Note)
    first, second = (asyncio.create_task(sender.send(Note(text))) for text in ("x" * 5_000_000, "cancelled"))
    for _ in range(3):  # the first is begun, the second waits
        await asyncio.sleep(0)

    second.cancel()
    third = asyncio.create_task(sender.send(Note("third")))
    received = [await asyncio.to_thread(receiver.receive, 10.0) for _ in range(2)]
    await asyncio.gather(first, third)

    assert [note.text[:10] for note in received] == ["x" * 10, "third"]
    assert receiver.receive(0.0) is None
    sender.close()
    receiver.close()
