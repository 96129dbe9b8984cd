"""Signal listener: a thread that hears signals while the main thread cannot.

Python runs a handler in the main thread alone, once what it does returns: an import, a wait for other ranks or for a
disk may take minutes. The system's own handler writes the signal's number to a file descriptor at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


class SignalListener:
    """Listens from construction to :meth:`stop`, both in the main thread.

    Args:
        heard: Called in the thread, with each signal that has a Python handler.
    """

    def __init__(self, heard: Callable[[signal.Signals], None]) -> None:
        self._heard = heard
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="kvds-signals", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Hear nothing more."""
        signal.set_wakeup_fd(self._before)
        os.close(self._writing)
        self._thread.join()
        os.close(self._reading)

    def _listen(self) -> None:
        while number := os.read(self._reading, 1):
            self._heard(signal.Signals(number[0]))
