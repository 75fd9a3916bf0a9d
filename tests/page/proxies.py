"""What stands between a page and the lab: a real nginx, and a network with gaps."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.visiting import free_port
from tests.waiting import wait_for

_CONFIGURATION = """
daemon off; pid {folder}/pid; error_log {folder}/errors; worker_processes 1;
events {{ worker_connections 256; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{ listen 127.0.0.1:{port}; proxy_http_version 1.1; {rules} }}
}}
"""


@contextlib.contextmanager
def nginx(folder: Path, rules: str) -> Iterator[str]:
    """A real nginx with these rules for its one server; gives its address."""
    path = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if not path:
        pytest.skip("no nginx found: run `apt-get install nginx-light`")
    port = free_port()
    file = folder / "nginx.conf"
    folder.chmod(0o755)
    file.write_text(_CONFIGURATION.format(folder=folder, port=port, rules=rules))
    process = subprocess.Popen([path, "-c", str(file), "-p", str(folder), "-e", str(folder / "errors")])
    try:
        wait_for(lambda: (folder / "pid").exists() and (folder / "pid").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
        assert "emerg" not in (folder / "errors").read_text()


class Network:
    """The way to a server, which can be cut: then nothing goes through, and nobody is let in.

    Args:
        port: the port of the server.
    """

    def __init__(self, port: int) -> None:
        self.target, self.port = port, free_port()
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.mend()

    def mend(self) -> None:
        """Let everybody through."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def cut(self) -> None:
        """Break all connections."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result()

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _cut(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.target)
        self._writers |= {writer, inner_writer}
        with contextlib.suppress(OSError):
            await asyncio.gather(self._copy(reader, inner_writer), self._copy(inner_reader, writer))
        self._writers -= {writer, inner_writer}

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()
