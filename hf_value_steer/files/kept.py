"""What a config names is loaded once, and again only when its files have changed."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar


MOST = 8  # so many are kept, those that were asked for last
T = TypeVar("T")
_kept: dict[tuple[Any, str], tuple[Any, Any]] = {}
_lock = threading.Lock()


def load_once(load: Callable[[str], T], location: str) -> T:
    """`load(location)`, or what it gave before. Nobody may change what is returned.

    Args:
        load: a `from_pretrained`.
        location: a folder, which is looked at again at every call, or a Hub id, which is loaded once a process.
    """
    key, stamp = (load, location), _stamp(Path(location))
    with _lock:
        found = _kept.pop(key, None)
        if found is None or found[0] != stamp:
            found = (stamp, load(location))
        _kept[key] = found
        while len(_kept) > MOST:
            del _kept[next(iter(_kept))]
    return found[1]


def given_or_loaded(load: Callable[[str], T], given: T | str) -> T:
    """What a config holds: the thing itself, or what its name stands for, loaded once."""
    return load_once(load, given) if isinstance(given, str) else given


def _stamp(folder: Path) -> list[tuple[str, int, int, int]] | None:
    """What is another thing once a file of the folder is; `None` if there is no such folder."""
    if not folder.is_dir():
        return None
    entries = ((path.name, path.stat()) for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return sorted((name, found.st_ino, found.st_mtime_ns, found.st_size) for name, found in entries)
