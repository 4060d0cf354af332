"""The report's scripts: two small libraries and page.js, all in the page, each allowed by its hash, and no other."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from scripts.comparing.pages.style import Picture

HERE = Path(__file__).parent
VENDOR = HERE / "vendor"
LIBRARIES = {"uPlot.iife.min.js": "uPlot.LICENSE", "sortable.min.js": "sortable.LICENSE"}
STYLES = "\n".join(path.read_text(encoding="utf-8") for path in (VENDOR / "uPlot.min.css", HERE / "page.css"))


def scripts() -> list[str]:
    """Their text, libraries first, each below its licence."""
    parts = [
        f"/*! {name}\n{(VENDOR / licence).read_text(encoding='utf-8')}*/\n{(VENDOR / name).read_text(encoding='utf-8')}"
        for name, licence in LIBRARIES.items()
    ]
    parts.append((HERE / "page.js").read_text(encoding="utf-8"))
    assert not any("</script" in part.lower() for part in parts)
    return parts


def policy(parts: list[str]) -> str:
    """What a browser lets the page do: its own scripts, its own styles, and no request to anywhere."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"


def data(picture: Picture) -> str:
    """A chart's lines, as an element that no browser runs."""
    text = json.dumps(picture.panels, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'
