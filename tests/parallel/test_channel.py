"""Messages between the engine and its ranks."""

from __future__ import annotations

import os
import socket
import threading

import pytest
import torch

from vllm_omni.diffusion.worker.channel import Channel, Message
from vllm_omni.errors import InsufficientMemoryError, InvalidRequestError, ModelNotFoundError


@pytest.fixture
def ends():
    ends = [Channel(end) for end in socket.socketpair()]
    yield ends
    for end in ends:
        end.close()


@pytest.mark.parametrize("numel", [0, 3, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_tensors_arrive_as_they_were_however_large(ends, numel, dtype):
    value = {"x": torch.arange(numel).to(dtype).view(1, numel), "y": [1, "two"], "z": torch.ones(2, 2)[:, 1]}
    ends[0].send(value)
    got = ends[1].receive()
    assert got["y"] == [1, "two"]
    for name in ("x", "z"):
        assert torch.equal(got[name], value[name])
        assert got[name].dtype == value[name].dtype
        got[name].zero_()  # it may be written to


@pytest.mark.parametrize("side", [1, 2, 200])
def test_tensors_keep_their_order_in_memory(ends, side):
    picture = torch.rand(1, side, side, 3).permute(0, 3, 1, 2)  # a convolution rounds otherwise if this is changed
    ends[0].send({"picture": picture, "number": torch.tensor(2.0)})
    got = ends[1].receive()
    assert torch.equal(got["picture"], picture)
    assert got["picture"].stride() == picture.stride()
    assert got["number"] == 2.0


def test_what_one_receiver_writes_the_other_does_not_see():
    pairs = [[Channel(end) for end in socket.socketpair()] for _ in range(2)]
    message = Message(torch.ones(100_000))
    for ours, _ in pairs:
        ours.send_message(message)
    message.close()
    first, second = (theirs.receive() for _, theirs in pairs)
    first.zero_()
    assert second.sum() == 100_000
    for pair in pairs:
        for end in pair:
            end.close()


def test_shared_memory_is_gone_with_the_last_tensor(ends):
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        ends[0].send(torch.ones(100_000))
        assert ends[1].receive().sum() == 100_000
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_an_error_keeps_its_type_its_attributes_and_its_cause(ends):
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise InvalidRequestError("height=7 is odd", param="height") from inner
    except InvalidRequestError as error:
        ends[0].send(error)
    got = ends[1].receive()
    assert type(got) is InvalidRequestError
    assert (str(got), got.param) == ("height=7 is odd", "height")
    assert isinstance(got.__cause__, KeyError)


@pytest.mark.parametrize("kind", [InsufficientMemoryError, ModelNotFoundError, torch.OutOfMemoryError, OSError])
def test_an_error_of_any_layout_arrives(ends, kind):
    ends[0].send(kind("too much"))
    got = ends[1].receive()
    assert (type(got), str(got)) == (kind, "too much")


def test_a_generator_goes_on_where_it_was(ends):
    generator = torch.Generator().manual_seed(3)
    torch.randn(5, generator=generator)
    ends[0].send(generator)
    assert torch.equal(torch.randn(4, generator=ends[1].receive()), torch.randn(4, generator=generator))


def test_the_end_of_the_other_side_is_an_error(ends):
    receiver = threading.Thread(target=ends[0].close)
    receiver.start()
    receiver.join()
    with pytest.raises(EOFError):
        ends[1].receive()
