"""A real gateway on a thread of its own, a proxy that loses what passes, and both clients behind one face."""

import asyncio
import contextlib
import threading
import time

from service.client import AsyncSequenceClient, SequenceClient
from service.sessions.memory import MemoryStore
from tests.service.support import NumpyExecutor, running_gateway


class LoopThread:
    """An event loop on a thread."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test loop")
        self._thread.start()

    def submit(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work):
        return self.submit(work).result(60)

    def call(self, function, *args):
        async def work():
            return function(*args)

        return self.run(work())

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class SharedStore(MemoryStore):
    """Outlives the gateway that it was lent to, as a server of its own would."""

    def __init__(self):
        super().__init__(max_sessions=1000, clock=time.time)

    async def close(self):
        pass


class GatewayThread:
    """A gateway that can be held, killed and started again, with the store that it shares with its successors."""

    def __init__(self, threads, store=None, port=0, executor=None, **settings):
        self._threads = threads
        self.executor = executor or NumpyExecutor()
        self.store = store or SharedStore()
        self._stack = contextlib.AsyncExitStack()
        self._running = threads.run(
            self._stack.enter_async_context(
                running_gateway(self.executor, self.store, listen=f"127.0.0.1:{port}", **settings)
            )
        )
        self.port = self._running.port
        self.target = self._running.target

    def hold(self):
        """Lets the model wait with its answers."""
        self._threads.call(self.executor.gate.clear)

    def release(self):
        self._threads.call(self.executor.gate.set)

    def steps_run(self):
        """Time steps that the model was asked for."""
        return sum(int(batch.lengths.sum()) for batch in self.executor.batches)

    def position(self, session):
        """Where a session stands in the store."""
        (key,) = [key for key in self.store._sessions if key.session_id == session.session_id]
        return self.store._live(key, 0.0).position

    def eventually(self, condition):
        """Returns once the condition, looked at on the gateway's loop, holds."""

        async def wait():
            async with asyncio.timeout(20):
                # What is waited for happens in another process's or thread's own time: nobody sets an event for it.
                while not condition():  # noqa: ASYNC110
                    await asyncio.sleep(0.002)

        self._threads.run(wait())

    def begin_drain(self):
        self._threads.call(self._running.gateway.engine._admission.drain)

    def kill(self):
        """Ends as a killed process does, as far as its clients can see: every connection is cut, nothing is said."""
        self._threads.run(self._running.gateway._server.stop(None))

    def close(self):
        self._threads.call(self.executor.gate.set)
        self._threads.run(self._stack.aclose())


class Proxy:
    """Passes connections on to a port of loopback; ``mute`` loses what is answered, ``cut`` resets everything."""

    def __init__(self, threads, port):
        self._threads = threads
        self._to = port
        self._muted = False
        self._connections = set()
        self._server = threads.run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.connections = 0
        self.target = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def mute(self):
        self._threads.call(setattr, self, "_muted", True)

    def cut(self):
        """Resets the connections that are there; those that come later pass, answers included."""

        def cut():
            self._muted = False
            for writer in self._connections:
                writer.transport.abort()

        self._threads.call(cut)

    def close(self):
        self.cut()
        self._threads.call(self._server.close)
        self._threads.run(self._ended())

    async def _ended(self):
        await self._server.wait_closed()
        async with asyncio.timeout(20):
            while self._connections:
                await self._end(next(iter(self._connections)))

    async def _serve(self, reader, writer):
        self.connections += 1
        self._connections.add(writer)
        try:
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            await self._end(writer)
            return
        self._connections.add(to_writer)
        await asyncio.gather(self._pump(reader, to_writer), self._pump(to_reader, writer, answers=True))
        await self._end(writer)
        await self._end(to_writer)

    async def _end(self, writer):
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        self._connections.discard(writer)

    async def _pump(self, reader, writer, answers=False):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if not (answers and self._muted):
                    writer.write(data)
                    await writer.drain()
        writer.close()


class BlockingFace:
    """The blocking client as it is; ``start`` begins a call and returns its future."""

    def __init__(self, threads, target, **options):
        self.client = SequenceClient(target, **options)

    def session(self, *args, **kwargs):
        return BlockingSession(self.client.session(*args, **kwargs))

    def attach(self, *args, **kwargs):
        return BlockingSession(self.client.attach(*args, **kwargs))

    def step_many(self, steps, **kwargs):
        return self.client.step_many([(session.session, inputs) for session, inputs in steps], **kwargs)

    def restore(self, *args, **kwargs):
        return BlockingSession(self.client.restore(*args, **kwargs))

    def sessions(self, **kwargs):
        return list(self.client.sessions(**kwargs))

    def models(self):
        return self.client.models()

    def model(self, name):
        return self.client.model(name)

    def sender_waits(self):
        """Whether what sends has nothing to send, and waits."""
        return bool(self.client._connection.threads._to_send._waiters)

    def close(self):
        self.client.close()


class BlockingSession:
    def __init__(self, session):
        self.session = session

    def start(self, inputs, **kwargs):
        return self.session.step_async(inputs, **kwargs)

    def fork(self):
        return BlockingSession(self.session.fork())

    def __getattr__(self, name):
        return getattr(self.session, name)


async def awaited(opening):
    return await opening


class AsyncFace:
    """The asyncio client, run on the test's loop thread so that it looks like the blocking one."""

    def __init__(self, threads, target, **options):
        async def make():
            return AsyncSequenceClient(target, **options)

        self._threads = threads
        self.client = threads.run(make())

    def _open(self, opening):
        return AsyncFaceSession(self._threads, self._threads.run(awaited(opening)))

    def session(self, *args, **kwargs):
        return self._open(self.client.session(*args, **kwargs))

    def attach(self, *args, **kwargs):
        return self._open(self.client.attach(*args, **kwargs))

    def step_many(self, steps, **kwargs):
        return self._threads.run(
            self.client.step_many([(session.session, inputs) for session, inputs in steps], **kwargs)
        )

    def restore(self, *args, **kwargs):
        return self._open(self.client.restore(*args, **kwargs))

    def sessions(self, **kwargs):
        async def gather():
            return [info async for info in self.client.sessions(**kwargs)]

        return self._threads.run(gather())

    def models(self):
        return self._threads.run(self.client.models())

    def model(self, name):
        return self._threads.run(self.client.model(name))

    def sender_waits(self):
        """See ``BlockingFace``."""
        idle = self.client._connection.tasks._idle
        return idle is not None and not idle.done()

    def close(self):
        self._threads.run(self.client.close())


class AsyncFaceSession:
    def __init__(self, threads, session):
        self._threads = threads
        self.session = session

    @property
    def session_id(self):
        return self.session.session_id

    @property
    def position(self):
        return self.session.position

    def start(self, inputs, **kwargs):
        return self._threads.submit(self.session.step(inputs, **kwargs))

    def step(self, inputs, **kwargs):
        return self._threads.run(self.session.step(inputs, **kwargs))

    def inspect(self):
        return self._threads.run(self.session.inspect())

    def info(self):
        return self._threads.run(self.session.info())

    def fork(self):
        return AsyncFaceSession(self._threads, self._threads.run(awaited(self.session.fork())))

    def snapshot(self):
        return self._threads.run(self.session.snapshot())

    def close(self):
        self._threads.run(self.session.close())
