"""What a terminal shows while a notebook runs: its cell, the bar that moves in it, the time left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MINUTE = 60  # seconds between two lines where there is no terminal


class Watch:
    """While it is entered, says where a notebook is: in one line of a terminal, else in a line a minute.

    status: the file that lgap_utils/progress.py writes. left: what to say of the whole run.
    """

    def __init__(self, n_cells: int, status: Path, left: Callable[[], str]):
        self.n_cells, self.status, self.left = n_cells, status, left
        self.cell, self.began, self.ended = 0, time.monotonic(), threading.Event()
        self.thread = threading.Thread(target=self._speak, daemon=True)

    def hook(self, cell: Any, cell_index: int) -> None:
        """For nbclient's on_cell_start."""
        if cell["cell_type"] == "code" and cell["source"].strip():
            self.cell += 1
            self.status.unlink(missing_ok=True)

    def line(self) -> str:
        parts = [f"cell {self.cell} of {self.n_cells}", self.left()]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or half written
            state = json.loads(self.status.read_text(encoding="utf-8"))
            words = [f"{state['what']}: {state['done']:g} of {state['total']:g} {state['unit']}s"]
            words += [state["note"]] if state["note"] else []
            words += [f"{duration(state['left'])} left"] if state["left"] is not None else []
            parts.append(", ".join(words))
        return " | ".join(filter(None, parts))

    def _speak(self) -> None:
        on_terminal = sys.stdout.isatty()
        with contextlib.suppress(OSError, ValueError):  # whoever read it is gone; the run says so itself
            while not self.ended.wait(1 if on_terminal else MINUTE):
                if on_terminal:
                    width = shutil.get_terminal_size().columns - 5
                    print(f"\r\x1b[K    {self.line()[:width]}", end="", flush=True)
                else:
                    print(f"    {duration(time.monotonic() - self.began)}: {self.line()}", flush=True)

    def __enter__(self) -> Watch:
        os.environ["LGAP_STATUS"] = str(self.status)  # the kernel inherits it
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join(timeout=5)
        os.environ.pop("LGAP_STATUS", None)
        self.status.unlink(missing_ok=True)
        with contextlib.suppress(OSError, ValueError):
            if sys.stdout.isatty():
                print("\r\x1b[K", end="", flush=True)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
