"""Whether a folder can be made and written, as far as this is visible without trying."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def nearest(folder: str) -> Path:
    """The folder, or the nearest of its parents that exists."""
    path = Path(folder).absolute()
    return next(one for one in (path, *path.parents) if os.path.lexists(one))


def obstacle(folder: str) -> int | None:
    """The error number of the reason why the folder cannot be made or written; None if no reason is visible."""
    path, existing = Path(folder).absolute(), nearest(folder)
    if not existing.is_dir():
        return errno.ENOTDIR
    if not os.access(existing, os.W_OK | os.X_OK):
        return errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
    longest = os.pathconf(existing, "PC_NAME_MAX")
    too_long = any(len(os.fsencode(part)) > longest for part in path.relative_to(existing).parts)
    return errno.ENAMETOOLONG if too_long else None
