"""Stands in for many web pages: a process that reads the lab's stream over many connections.

It shares the cores with the engine that is measured, so it does as little as possible: twenty times a second
it reads what has come, and counts. It imports nothing of labkit.

    python watchers.py PORT PATH COUNT

It prints "ready" once all have got their first event, and its counts, as JSON, once its standard input ends.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import threading
import time

WATCHERS = 50
PAUSE = 0.05  # seconds between two looks
END = b"\n\n"  # of an event


class Watchers:
    """Connections that read the stream at a path; raises `OSError` if they cannot be made."""

    def __init__(self, port: int, path: str, count: int) -> None:
        self.frames = [0] * count
        self.bytes = 0
        self.lost = 0
        self._last = [
            b""
        ] * count  # byte of each connection's latest piece, because an event may end in the next
        self._selector = selectors.DefaultSelector()
        for i in range(count):
            connection = socket.create_connection(("127.0.0.1", port), timeout=30)
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n".encode())
            head = connection.recv(1 << 16)
            if not head.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(f"there is no stream: {head[:80]!r}")
            self._count(i, head)
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, i)

    def look(self) -> None:
        """Read what has come."""
        time.sleep(PAUSE)
        for key, _ in self._selector.select(0):
            piece = key.fileobj.recv(1 << 20)  # type: ignore[union-attr]
            if piece:
                self._count(key.data, piece)
            else:
                self.lost += 1
                self._selector.unregister(key.fileobj)

    def _count(self, i: int, piece: bytes) -> None:
        self.bytes += len(piece)
        self.frames[i] += piece.count(END) + (self._last[i] == b"\n" == piece[:1])
        self._last[i] = piece[-1:]

    def forget(self) -> None:
        """Count from now on."""
        self.frames = [0] * len(self.frames)
        self.bytes = 0


def main(port: int, path: str, count: int) -> None:
    """Watch until standard input ends; raise `OSError` if that cannot be done."""
    watchers = Watchers(port, path, count)
    while not all(watchers.frames):
        watchers.look()
        if watchers.lost:
            raise ConnectionError("the stream has ended")
    ending = threading.Thread(target=sys.stdin.read, daemon=True)
    ending.start()
    watchers.forget()
    begin, worked = time.perf_counter(), time.process_time()
    print("ready", flush=True)
    while ending.is_alive():
        watchers.look()
    figures = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - worked,
        "frames": watchers.frames,
        "bytes": watchers.bytes,
        "lost": watchers.lost,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
