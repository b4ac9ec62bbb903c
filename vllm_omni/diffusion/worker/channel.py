"""Messages between the engine and its ranks, over a socket.

Small ones travel in the socket. Large ones, as with a picture or a video, lie in anonymous shared memory: a broadcast
copies them once. On the same machine its descriptor travels, and the kernel frees it when the last process lets go or
dies; to another machine its content does.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any

import torch

from vllm_omni.errors import restored_error

_HEADER = struct.Struct("<QQ?")  # bytes of the message, of them the pickle's, whether they lie in shared memory
_INLINE = 1 << 16  # bytes
_ALIGNMENT = 64  # bytes, of each tensor


class Message:
    """A pickled object with its tensors beside it, ready to be sent to any number of channels."""

    def __init__(self, value: Any) -> None:
        tensors: list[torch.Tensor] = []
        buffer = io.BytesIO()
        _Pickler(buffer, tensors).dump(value)
        sizes = [_padded(tensor.numel() * tensor.element_size()) for tensor in tensors]
        self.num_pickled = buffer.tell()
        self.num_bytes = _padded(self.num_pickled) + sum(sizes)
        self._pickled, self._tensors, self._sizes = buffer.getbuffer(), tensors, sizes
        self.descriptor: int | None = None
        self.inline: bytes | None = None
        if self.num_bytes <= _INLINE:
            inline = bytearray(self.num_bytes)
            self._write(memoryview(inline))
            self.inline = bytes(inline)
        else:
            self.descriptor = os.memfd_create("vllm-omni")
            os.ftruncate(self.descriptor, self.num_bytes)
            with mmap.mmap(self.descriptor, self.num_bytes) as mapped:
                view = memoryview(mapped)
                self._write(view)
                view.release()

    def _write(self, target: memoryview) -> None:
        target[: self.num_pickled] = self._pickled
        start = _padded(self.num_pickled)
        for tensor, size in zip(self._tensors, self._sizes, strict=True):
            num_bytes = tensor.numel() * tensor.element_size()
            if num_bytes:
                part = torch.frombuffer(target, dtype=torch.uint8, count=num_bytes, offset=start)
                part.copy_(tensor.reshape(-1).view(torch.uint8))
                del part
            start += size

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class Channel:
    """One end of a socket. Raises ``OSError`` or ``EOFError`` where the other end is gone.

    Threads may send side by side. While one of them makes a message, as of a video, the others are not kept waiting.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()
        self._is_local = end.family == socket.AF_UNIX  # descriptors can travel

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, value: Any) -> None:
        message = Message(value)
        try:
            self.send_message(message)
        finally:
            message.close()

    def send_message(self, message: Message) -> None:
        with self._sending:
            header = _HEADER.pack(message.num_bytes, message.num_pickled, message.descriptor is not None)
            if message.descriptor is None:
                assert message.inline is not None, "a message is in shared memory or inline"
                self._socket.sendall(header + message.inline)
            elif not self._is_local:
                self._socket.sendall(_HEADER.pack(message.num_bytes, message.num_pickled, False))
                with open(message.descriptor, "rb", closefd=False) as content:
                    self._socket.sendfile(content, 0, message.num_bytes)
            else:
                self._socket.sendall(header)
                socket.send_fds(self._socket, [b"\0"], [message.descriptor])

    def receive(self) -> Any:
        num_bytes, num_pickled, is_shared = _HEADER.unpack(self._read(_HEADER.size))
        if not is_shared:
            return _loads(self._read(num_bytes), num_pickled)
        _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
        if not descriptors:
            raise EOFError("the other end closed the channel")
        try:
            # Private: what one rank writes into its inputs is not seen by another.
            mapped = mmap.mmap(descriptors[0], num_bytes, flags=mmap.MAP_PRIVATE)
        finally:
            os.close(descriptors[0])
        return _loads(mapped, num_pickled)

    def close(self) -> None:
        self._socket.close()

    def _read(self, num_bytes: int) -> bytearray:
        content = bytearray(num_bytes)
        left = memoryview(content)
        while left:
            count = self._socket.recv_into(left)
            if not count:
                raise EOFError("the other end closed the channel")
            left = left[count:]
        return content


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class _Pickler(pickle.Pickler):
    """Puts tensors aside, and takes apart errors, which cannot be pickled as they are, and random generators."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file, protocol=5)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> Any:
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            return None
        # In the order in which they lie in memory: a convolution over another rounds otherwise.
        order = sorted(range(value.dim()), key=lambda dim: -value.stride(dim))
        tensor = value.detach().cpu().permute(order).contiguous()
        self._tensors.append(tensor)
        return (value.dtype, tuple(tensor.shape), tuple(order.index(dim) for dim in range(value.dim())))

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Generator):
            return _restored_generator, (value.device.type, value.get_state())
        if isinstance(value, BaseException):
            return _restored_error, (type(value), value.args, _plain(value.__dict__), value.__cause__)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, buffer: Any, start: int) -> None:
        super().__init__(file)
        self._buffer, self._start = buffer, start

    def persistent_load(self, key: Any) -> torch.Tensor:
        # Tensors come in the order in which they were put aside.
        dtype, shape, places = key
        numel = torch.Size(shape).numel()
        if numel == 0:
            return torch.empty(shape, dtype=dtype).permute(places)
        tensor = torch.frombuffer(self._buffer, dtype=dtype, count=numel, offset=self._start).view(shape)
        self._start += _padded(numel * tensor.element_size())
        return tensor.permute(places)


def _loads(buffer: Any, num_pickled: int) -> Any:
    return _Unpickler(io.BytesIO(bytes(buffer[:num_pickled])), buffer, _padded(num_pickled)).load()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Those of an error's attributes that can be pickled."""
    kept = {}
    for name, value in values.items():
        try:
            pickle.dumps(value)
        except Exception:  # what cannot be pickled says so by any kind of error
            kept[name] = repr(value)
        else:
            kept[name] = value
    return kept


def _restored_generator(device_type: str, state: torch.Tensor) -> torch.Generator:
    """On the device of this rank, which may know it by another number."""
    return torch.Generator(device_type).set_state(state.clone())


def _restored_error(
    kind: type[BaseException], args: Sequence[Any], attributes: dict[str, Any], cause: BaseException | None
) -> BaseException:
    error = restored_error(kind, tuple(args), attributes)
    error.__cause__ = cause
    return error
