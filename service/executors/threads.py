"""What a thread that works in the background begins with."""

import contextlib
import os
import sys
import threading
from pathlib import Path


def begin_thread(name: str, niceness: int) -> None:
    """Tells the operating system what this thread is, and that it yields to others, where threads have these things.

    Args:
        name: Shows whose CPU time is whose.
        niceness: As of ``nice``: 0 is what a process has, 19 the lowest priority.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        Path("/proc/thread-self/comm").write_text(name)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
