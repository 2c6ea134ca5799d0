"""Files that are there completely or not at all, and folders that remember what they hold."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_value_steer.files.reading import read_record


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there completely or not at all, whenever the process or the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} could not be written ({error.strerror}); run again to go on") from error


def write_new(path: Path, text: Callable[[], str]) -> None:
    """Write a text atomically, unless there is a file already, which somebody may have edited."""
    if not path.exists():
        write_atomically(path, text().encode())


def write_json(path: Path, document: Any) -> None:
    """Write `document` as sorted, indented JSON, atomically.

    Raises:
        ValueError: for NaN and infinity, which JSON does not know: what is not known is `None`.
    """
    try:
        text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} would hold NaN or infinity, which JSON does not know: {error}.") from error
    write_atomically(path, f"{text}\n".encode())


def read_utf8(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, its lines ended in any way.

    Raises:
        ValueError: if it is in another encoding.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not in UTF-8 (line {line}, byte {error.start} of it): save it in UTF-8."
        ) from error
    if "\0" in text:  # in every other byte of English text in UTF-16, which can be read as UTF-8
        raise ValueError(f"{path} is not a text in UTF-8, but perhaps in UTF-16: save it in UTF-8.")
    return text


def claim(path: Path, document: dict[str, Any]) -> None:
    """Write what a folder holds, or refuse to go on in a folder that holds something else.

    Raises:
        ArtefactError: if what is there cannot be read.
        ValueError: names what differs.
    """
    if path.exists():
        _refuse(path, _difference("", read_record(path), document))
    write_json(path, document)


def refuse_other(path: Path, part: dict[str, Any]) -> None:
    """Refuse a folder of which it is plain already that it holds something else than this `part` of what is to be."""
    if path.exists():
        before = read_record(path)
        _refuse(path, _difference("", {name: before.get(name) for name in part}, part))


def _refuse(path: Path, difference: str | None) -> None:
    if difference is not None:
        raise ValueError(f"{path.parent} was made with {difference}: delete the folder, or choose another.")


def _difference(name: str, before: Any, now: Any) -> str | None:
    """The first difference, as deep as it lies."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return None if before == now else f"{name} = {before!r}, now it is {now!r}"
    names = sorted(before.keys() | now.keys())
    found = (_difference(f"{name}.{each}".lstrip("."), before.get(each), now.get(each)) for each in names)
    return next((each for each in found if each is not None), None)
