"""Signals that ask a run to stop: who hears them, and what a second one does."""

import os
import signal
import socket
import sys
import threading
import time

# SIGUSR1 is Slurm's warning, SIGHUP a terminal or connection that closes; Windows has neither.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))

# Launchers signal every process of a job and pass signals on besides, so that one stop arrives two or three times.
GRACE = 5.0  # seconds within which more signals are the same stop


class Interrupted(BaseException):
    """A stop that comes where nothing has to be finished first. number: the signal's."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


def interrupt(number):
    raise Interrupted(number)


def end_at_once():
    """End the process at a stop, with one line and 128 + the signal's number, until `handle` is called."""

    def end(number, frame):
        name = os.path.basename(sys.argv[0])
        os.write(2, f"{name}: interrupted by {signal.Signals(number).name}: run the same command again\n".encode())
        os._exit(128 + number)

    for number in SIGNALS:
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def handle(note):
    """Have note(number) called in the main thread at the first of SIGNALS; returns a function that undoes this.

    More of them within GRACE seconds are the same stop; a later one ends the process at once, with 128 + its number.
    What is ignored already stays ignored, as SIGHUP by nohup, but for SIGINT, which shells have their background jobs
    ignore without being asked. From another thread than the main one: does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    asked = False

    def once(number, frame):
        nonlocal asked
        if not asked:
            asked = True
            note(number)

    _second.watch()
    ours = [n for n in SIGNALS if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, once) for number in ours}

    def undo():
        for number, handler in before.items():
            signal.signal(number, handler)

    return undo


class _SecondSignal:
    """A thread that ends the process at a second stop, since the main thread may be stuck where Python hears nothing.

    That is any call into a library: a collective whose peer hangs, a file system that is gone.
    """

    def __init__(self):
        self.first = None  # when
        self.reader = self.writer = None

    def watch(self):
        """Count from now on."""
        self.first = None
        if self.reader is None:
            self.reader, self.writer = socket.socketpair()
            self.writer.setblocking(False)
            threading.Thread(target=self._read, daemon=True).start()
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)

    def _read(self):
        while True:
            number = self.reader.recv(1)[0]
            if number not in SIGNALS:
                continue
            now = time.monotonic()
            if self.first is None:
                self.first = now
            elif now - self.first > GRACE:
                name = os.path.basename(sys.argv[0])
                os.write(2, f"{name}: stopped at once, by a second {signal.Signals(number).name}\n".encode())
                os._exit(128 + number)


_second = _SecondSignal()
