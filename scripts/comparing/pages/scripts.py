"""The scripts of the report: two small libraries and page.js. All are inside the page, and its policy allows only them,
by their hashes."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from scripts.comparing.pages.style import Picture

FILES = Path(__file__).resolve().parent
VENDOR = FILES / "vendor"
LIBRARIES = {"uPlot.iife.min.js": "uPlot.LICENSE", "sortable.min.js": "sortable.LICENSE"}
STYLES = "\n".join(path.read_text(encoding="utf-8") for path in (VENDOR / "uPlot.min.css", FILES / "page.css"))


def scripts() -> list[str]:
    """The text of the scripts. The libraries are first, each after its licence."""
    parts = [
        f"/*! {name}\n{(VENDOR / licence).read_text(encoding='utf-8')}*/\n{(VENDOR / name).read_text(encoding='utf-8')}"
        for name, licence in LIBRARIES.items()
    ]
    parts.append((FILES / "page.js").read_text(encoding="utf-8"))
    assert not any("</script" in part.lower() for part in parts)
    return parts


def policy(parts: list[str]) -> str:
    """The policy for the browser: only the page's own scripts and styles, and no network requests."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"


def data(picture: Picture) -> str:
    """The lines of a chart as JSON, in an element that browsers do not execute."""
    text = json.dumps(picture.panels, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'
