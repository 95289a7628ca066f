"""A TCP proxy that a test cuts, stops, and lets go on."""

import asyncio
import contextlib


class Proxy:
    """Passes connections on to ``port`` of loopback.

    ``requests`` cleared: what is sent waits here; ``replies``: what the server answers. ``held`` tells that something
    does. ``refuse``: new connections are closed at once.
    """

    def __init__(self, port: int):
        self.target = port
        self.port = 0
        self.refuse = False
        self.requests = asyncio.Event()
        self.replies = asyncio.Event()
        self.requests.set()
        self.replies.set()
        self.asked = asyncio.Event()  # bytes of a request have been passed on
        self.held = asyncio.Event()
        self._writers = set()
        self._serving = set()
        self._server = None

    async def start(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    def cut(self):
        """Resets every connection."""
        for writer in list(self._writers):
            writer.transport.abort()

    def pass_all(self):
        """Holds nothing back any more."""
        self.requests.set()
        self.replies.set()

    async def close(self):
        self._server.close()
        self.cut()
        self.pass_all()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader, writer):
        if self.refuse:
            writer.transport.abort()
            return
        try:
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, to_writer}
        self._serving.add(asyncio.current_task())
        try:
            await asyncio.gather(
                self._pump(reader, to_writer, self.requests, self.asked), self._pump(to_reader, writer, self.replies)
            )
        finally:
            self._writers -= {writer, to_writer}
            self._serving.discard(asyncio.current_task())

    async def _pump(self, reader, writer, gate, passed=None):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if not gate.is_set():
                    self.held.set()
                    await gate.wait()
                writer.write(data)
                if passed is not None:
                    passed.set()
                await writer.drain()
        writer.close()
