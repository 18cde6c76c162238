"""Python processes that begin with the heavy packages imported: children of one process that imported them and waits.

A fresh interpreter spends eight seconds on imports before its first line of ours; a dozen tests need one only for what
a process has of its own: arguments, environment, standard streams, signals, its end. `Popen` here starts such a child.
Not for tests of what is imported when, nor of variables that a library reads on its import.
"""

from __future__ import annotations

import array
import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

IMPORTS = ("metaaux.pipeline", "metaaux.cli", "metaaux.training.generator")


class Popen:
    """A child that runs `python *arguments`, where `arguments` begin with a script's path or with `-m` and a module.

    The part of `subprocess.Popen` that tests use, with its meaning: `stdout` and `stderr` are files,
    `subprocess.PIPE`, `subprocess.DEVNULL` or None (this process's own).
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        stdout=None,
        stderr=None,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ):
        self.stdout, out = self._stream(stdout, 1)
        self.stderr, err = self._stream(stderr, 2)
        if stderr == subprocess.STDOUT:
            err = os.dup(out)
        request = {
            "arguments": [str(argument) for argument in arguments],
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or Path.cwd()),
        }
        self._status, theirs = socket.socketpair()
        sent = [theirs.fileno(), out, err]
        # The request lies in a file of its own, since a message of a socket has a limit.
        request_file = os.memfd_create("request")
        os.write(request_file, json.dumps(request).encode())
        sent.append(request_file)
        _waiting().sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", sent))])
        theirs.close()
        for descriptor in (out, err, request_file):
            os.close(descriptor)
        self._lines = self._status.makefile("r")
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    @staticmethod
    def _stream(wanted, number):
        """The readable end for the test, if any, and a descriptor to hand over."""
        if wanted == subprocess.PIPE:
            ours, theirs = os.pipe()
            return os.fdopen(ours, "rb"), theirs
        if wanted in (None, subprocess.STDOUT):
            return None, os.dup(number)
        if wanted == subprocess.DEVNULL:
            return None, os.open(os.devnull, os.O_WRONLY)
        return None, os.dup(wanted.fileno())

    def poll(self) -> int | None:
        """As `wait`, or None while the child runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The child's exit status, or minus the signal that ended it.

        Raises:
            subprocess.TimeoutExpired: It still runs after `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("python", timeout)
            self.returncode = int(self._lines.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[bytes | None, bytes | None]:
        """What it wrote into its pipes, at most one of which may grow large, and waits for its end."""
        written = [None if stream is None else stream.read() for stream in (self.stdout, self.stderr)]
        self.wait(timeout)
        return written[0], written[1]

    def send_signal(self, number: int) -> None:
        """Sends a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


@lru_cache(1)
def _waiting() -> socket.socket:
    """The way to the process that has everything imported; started once."""
    ours, theirs = socket.socketpair()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())], env=environment, pass_fds=[theirs.fileno()]
    )  # ends by itself when our end of the socket closes
    theirs.close()
    atexit.register(ours.close)
    return ours


def _serve(requests: socket.socket) -> None:
    """Forks a child for each request, and a parent of it that reports its number and its end."""
    for name in IMPORTS:
        __import__(name)
    # A child that ends would look at all these objects once more, and so copy the memory they lie in: over a second.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, ancillary, _, _ = requests.recvmsg(1, socket.CMSG_SPACE(4 * 4))
        if not message:
            return
        descriptors = array.array("i", ancillary[0][2])
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            status, out, err, request_file = descriptors
            child = os.fork()
            if child == 0:
                os.close(status)
                _become(out, err, request_file)
                return
            for descriptor in (out, err, request_file):
                os.close(descriptor)
            os.write(status, f"{child}\n".encode())
            os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _become(out: int, err: int, request_file: int) -> None:
    """Runs what was asked for as if this process had been started for it."""
    import io
    import runpy

    with os.fdopen(request_file, "rb") as file:
        file.seek(0)
        request = json.load(file)
    arguments, environment = request["arguments"], request["environment"]
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(environment)
    encoding, _, errors = environment.get("PYTHONIOENCODING", "utf-8").partition(":")
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), encoding, errors or "strict", write_through=False)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), encoding, "backslashreplace", line_buffering=True)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    sys.path[0] = request["folder"]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
