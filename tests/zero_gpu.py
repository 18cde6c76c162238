"""ZeroGPU without a GPU: `app.py` runs under the `spaces` package's own wrappers, which fork a worker process for each
GPU function, pass arguments and results through pipes and wrap up errors as on a Space. Two things are replaced, for
want of them here: the service that lends GPUs, by a small server that grants every request and notes it, and CUDA's
initialisation in the worker. The models stay on the CPU, so moving weights is not part of it.
"""

from __future__ import annotations

import runpy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

ROOT = Path(__file__).resolve().parent.parent


class GpuLender:
    """What asked for a GPU.

    Attributes:
        url: of the service.
        requested: seconds of each request, in order.
        failed: releases that reported a failure.
        meet: where requests wait for each other, if they shall.
    """

    def __init__(self) -> None:
        self.url = ""
        self.requested: list[int] = []
        self.failed = 0
        self.meet: threading.Barrier | None = None

    def answer(self, path: str, query: dict[str, str]) -> str | None:
        """The JSON that a request is answered with, if any."""
        if path == "/schedule":
            self.requested.append(int(query["durationSeconds"]))
            number = len(self.requested)
            if self.meet is not None:
                self.meet.wait()
            return f'{{"idle": true, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": "{number}"}}'
        if path == "/release" and query["fail"] == "true":
            self.failed += 1
        return None


@contextmanager
def lent_gpus() -> Iterator[GpuLender]:
    """A running service that lends GPUs there are not."""
    lender = GpuLender()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            address = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
            body = (lender.answer(address.path, query) or "{}").encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    lender.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield lender
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(lender: GpuLender, folder: Path) -> dict[str, str]:
    """The variables by which the `spaces` package knows that it is on ZeroGPU."""
    group = folder / "cgroup"
    group.write_text("0::/app\n")
    return {
        "SPACES_ZERO_GPU": "true",
        "SPACES_ZERO_DEVICE_API_URL": lender.url,
        "ZEROGPU_PROC_SELF_CGROUP_PATH": str(group),
        "ZEROGPU_OFFLOAD_DIR": str(folder / "tensors"),
        "METAAUX_DEVICE": "cpu",
    }


def main() -> None:
    """Runs app.py as its own process."""
    import torch

    if torch.version.cuda is None:
        # A build without CUDA lacks what the package looks at and puts its own in place of: the version, the
        # initialisation, and whether that happened before the fork, which it asks another process (False here).
        torch.version.cuda = "12.8"
        torch._C._cuda_init = lambda: None
        torch.cuda._is_in_bad_fork = bool
    import spaces  # noqa: F401
    from gradio import networking
    from spaces.zero import torch as gpu

    gpu.init = lambda uuid: None
    gpu.move = lambda callback=None: None
    # Gradio gives its own server three seconds to answer, which are few where other programs compute too.
    answers = networking.url_ok
    networking.url_ok = lambda url: any(answers(url) for _ in range(10))
    runpy.run_path(str(ROOT / "app.py"), run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
