"""Progress bars: on a screen, or for `run_all.sh`, which names a file in $LGAP_STATUS, as a line in it."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm as on_screen
from tqdm.std import tqdm as plain


class InFile(plain):
    """A bar that is shown nowhere: what it would show goes into the file $LGAP_STATUS."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "file": io.StringIO()})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        shown = self.format_dict
        pace = shown["rate"] or (shown["n"] - shown["initial"]) / max(shown["elapsed"], 1e-9)
        left = (shown["total"] - shown["n"]) / pace if shown["total"] and pace else None
        state = {"what": self.desc, "done": shown["n"], "total": shown["total"], "unit": shown["unit"]}
        with contextlib.suppress(OSError):  # a full disk is told where results are written
            text = json.dumps(state | {"left": left, "note": self.postfix or ""})
            Path(os.environ["LGAP_STATUS"]).write_text(text, encoding="utf-8")
        return True


tqdm = InFile if os.environ.get("LGAP_STATUS") else on_screen
