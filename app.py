"""The demo: `python app.py`. `metaaux/demo/settings.py` lists the environment variables that change it."""

from __future__ import annotations

import spaces  # noqa: F401  (before PyTorch, as ZeroGPU needs it)

from metaaux.demo import Settings, build_demo, launch

if __name__ == "__main__":
    demo, engine = build_demo(Settings.from_environment())
    launch(demo, engine)
