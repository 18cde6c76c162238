"""Runs `app.py` in a process of its own, as visitors meet it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gradio_client import Client

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class RunningApp:
    """Address of a server, its process, the folder of its cache, its log, and seconds until it answered."""

    url: str
    process: subprocess.Popen
    cache: Path
    log: Path
    started_in: float

    @property
    def resident_mb(self) -> float:
        """Its memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    def files(self) -> set[str]:
        """Files in its cache."""
        return {str(path.relative_to(self.cache)) for path in self.cache.rglob("*") if path.is_file()}


def new_client(app: RunningApp, folder: Path) -> Client:
    """A program that calls the app's endpoints; what it downloads goes into `folder`."""
    # httpx gives a server five seconds, which one that computes for eight others may need.
    options = {"verbose": False, "analytics_enabled": False, "httpx_kwargs": {"timeout": 120}}
    return Client(app.url, download_files=folder, **options)


def new_interpreter(arguments: list[str], **options) -> subprocess.Popen:
    """Runs Python with `arguments`; `options` are `subprocess.Popen`'s."""
    return subprocess.Popen([sys.executable, *arguments], **options)


@contextmanager
def running_app(folder: Path, script: str = "app.py", start: Callable = new_interpreter, **environment: str):
    """Starts the app, or a script that starts it, with a cache in `folder`, yields a `RunningApp` once it answers, and
    ends it. `start` may be `warm.Popen`, where importing PyTorch is not what is tested."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cache, log = folder / "cache", folder / "app.log"
    cache.mkdir(parents=True)
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("GRADIO_", "METAAUX_"))},
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    started = time.monotonic()
    with log.open("wb") as output:
        process = start([script], cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}/"
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - started < 120, "the app did not start:\n" + log.read_text()
            try:
                urllib.request.urlopen(url, timeout=5).read()
                break
            except OSError:
                time.sleep(0.1)
        yield RunningApp(url, process, cache, log, time.monotonic() - started)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
