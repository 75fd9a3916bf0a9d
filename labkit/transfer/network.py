"""Pages over TCP, from one process to another: the buffer of bytes that a file holds, after its length.

The two ends take turns: length, answer, pages, answer. An answer is a text, empty where all is well. Nothing
is encrypted and nobody is asked for a name: this is for loopback, or where everybody may fill the cache.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator

from labkit.outputs import in_one_line
from labkit.transfer.pages import KVPages, TransferError

_MAGIC = b"labkitkv"
_HEADER = struct.Struct("<8sQ")  # the magic, and how many bytes follow
_ANSWER = struct.Struct("<H")  # how many bytes of UTF-8 follow
_MAX_ANSWER = 1000  # bytes


def send_kv(address: tuple[str, int], pages: KVPages, *, timeout: float = 30.0) -> None:
    """Send pages to a `KVReceiver`, and return when it has checked them.

    Args:
        address: the host and the port of the receiver.
        pages: what `export_kv` returned.
        timeout: how many seconds all of it may take.

    Raises:
        TransferError: if they do not arrive, or the receiver refuses them; the message says why.
    """
    data, deadline = pages.to_bytes(), time.monotonic() + timeout
    with _named(f"the pages did not reach {address}"), socket.create_connection(address, timeout) as peer:
        for part in (_HEADER.pack(_MAGIC, len(data)), data):
            peer.settimeout(_left(deadline))
            peer.sendall(part)
            (length,) = _ANSWER.unpack(_read(peer, _ANSWER.size, deadline))
            if length:
                why = _read(peer, min(length, _MAX_ANSWER), deadline).decode(errors="replace")
                raise TransferError(f"{address} refuses the pages: {why}")


class KVReceiver:
    """Listens at one address (`OSError`, if it cannot), and takes pages from one sender at a time.

    Args:
        address: the host and the port, of which 0 is a free one; the attribute says which.
        max_bytes: the most that a sender may send.
        timeout: how many seconds a sender may take.
    """

    def __init__(
        self, address: tuple[str, int] = ("127.0.0.1", 0), *, max_bytes: int = 2**30, timeout: float = 30.0
    ) -> None:
        self.max_bytes, self.timeout = max_bytes, timeout
        self._socket = socket.create_server(address)
        self.address: tuple[str, int] = self._socket.getsockname()
        self.close = self._socket.close

    def receive(self, timeout: float | None = None) -> KVPages:
        """Wait for a sender so many seconds (None is for ever), and return its pages.

        Raises:
            TimeoutError: if nobody came.
            TransferError: if what came is damaged, cut, too large or something else. The sender is told, and
                the next one can be received.
        """
        self._socket.settimeout(timeout)
        peer, host = self._socket.accept()
        deadline = time.monotonic() + self.timeout
        with peer, _named(f"no pages came from {host}"):
            try:
                magic, length = _HEADER.unpack(_read(peer, _HEADER.size, deadline))
                if magic != _MAGIC:
                    raise TransferError(f"these are no pages of labkit: they begin with {magic!r}")
                if length > self.max_bytes:
                    raise TransferError(f"max_bytes is {self.max_bytes}, and these pages have {length}")
                _answer(peer, "", deadline)
                pages = KVPages.from_bytes(_read(peer, length, deadline))
            except TransferError as error:
                with contextlib.suppress(OSError):  # the sender may be gone
                    _answer(peer, str(error), deadline)
                raise
            _answer(peer, "", deadline)
            return pages


def _read(peer: socket.socket, length: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < length:
        peer.settimeout(_left(deadline))
        chunk = peer.recv(min(2**20, length - len(data)))  # memory is taken as it comes, not as announced
        if not chunk:
            raise TransferError(f"the connection was cut after {len(data)} of {length} bytes")
        data += chunk
    return bytes(data)


def _answer(peer: socket.socket, text: str, deadline: float) -> None:
    data = text.encode()[:_MAX_ANSWER]
    peer.settimeout(_left(deadline))
    peer.sendall(_ANSWER.pack(len(data)) + data)


def _left(deadline: float) -> float:
    if (seconds := deadline - time.monotonic()) <= 0:
        raise TimeoutError("timed out")
    return seconds


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TransferError(f"{what}: {in_one_line(error)}") from None
