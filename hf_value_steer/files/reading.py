"""Files that others may have written: found, or said to be missing; read, or refused by an error that names them."""

import difflib
import json
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils.hub import cached_file

from hf_value_steer.errors import ArtefactError


# Arguments of `from_pretrained` that say where files are: inside a repository, and how it is reached.
PLACE = ("revision", "subfolder")
ACCESS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
LOCATION = (*PLACE, *ACCESS)

_FLOATING = ("F16", "BF16", "F32", "F64")  # as safetensors spells them


@contextmanager
def reading(path: str | os.PathLike[str], kind: str, remedy: str = "Save it, or download it, again") -> Iterator[None]:
    """Whatever is found to be wrong with a file inside the block becomes an `ArtefactError` that names the file.

    That a file is not there stays an `OSError`.

    Args:
        path: the file.
        kind (`str`): what it should be.
        remedy (`str`): what to do.
    """
    try:
        yield
    except OSError:
        raise
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}") from error
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        reason = textwrap.shorten(reason, 400, placeholder=" ...").rstrip(".")
        raise ArtefactError(f"{path} is no {kind}: {reason}. {remedy}.") from error


def read_object(path: Path, kind: type = dict) -> Any:
    """The JSON object in a file, or what else of a `kind` is there; for use inside [`reading`]."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, kind):
        wanted = {dict: "object", list: "list", float: "number"}[kind]
        raise ValueError(f"it should hold a JSON {wanted}, but holds a {type(found).__name__}.")
    return found


def read_record(
    path: Path,
    *needed: str,
    kind: type[Any] = dict,
    remedy: str = "Put the original back, or delete it and run again",
) -> Any:
    """The JSON that this library wrote into a file, which somebody may have cut or edited since.

    Args:
        needed (`str`): keys that have to be there.
        kind: of the JSON: `dict`, `list`, `float`.
        remedy (`str`): what to do if it is wrong.

    Raises:
        ArtefactError: names the file.
    """
    with reading(path, "record of what was done", remedy):
        found = read_object(path, kind)
        if missing := [name for name in needed if name not in found]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return found


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a `.safetensors` file, of which no data is read; for use inside [`reading`].

    Raises:
        ArtefactError: for a tensor that is not of floating-point numbers.
    """
    shapes = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in _FLOATING:
                raise ArtefactError(
                    f"tensor {name!r} is of {tensor.get_dtype()}, it should be of floating-point numbers "
                    f"({', '.join(_FLOATING)}): save the original again."
                )
            shapes[name] = tuple(tensor.get_shape())
    return shapes


def find(source: str, name: str, kind: str, *, optional: bool = False, **location: Any) -> Path | None:
    """Where a file of a folder, or of a repository on the Hub, lies on this machine; `None` if it is not in there.

    Args:
        source (`str`): the folder or Hub id.
        name (`str`): the file.
        kind (`str`): what `source` should be, for errors.
        optional (`bool`): whether a repository may lack it. One that cannot be reached does, too.
        location: arguments of `from_pretrained` in `LOCATION`.

    Raises:
        OSError: if there is neither such a folder nor such a repository.
    """
    refuse_misspelt(source, kind, location.get("revision"))
    if os.path.isdir(source):
        path = Path(source, location.get("subfolder") or "", name)
        return path if path.is_file() else None
    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=not optional, **location)
    except OSError as error:
        raise OSError(f"No {kind} at {source!r}, neither a folder here nor on the Hub: {error}") from error
    return Path(found) if found else None


def refuse_misspelt(source: str, kind: str, revision: str | None = None) -> None:
    """Raise an `OSError`, without asking the Hub, if `source` can only be meant as a folder and there is none.

    That is so if it looks like a path, or if there is a folder of nearly that name: one of something saved, and of the
    same digits, since `model-7b` is no misspelt `model-8b`. Who passes a `revision` means a repository.
    """
    path = Path(source)
    if path.is_dir():
        return
    if path.is_file():
        raise NotADirectoryError(f"{source!r} is a file: pass the folder of the {kind}, or its Hub id.")
    local = source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1
    alike = _alike(Path(os.path.expanduser(source))) if local or (revision is None and path.parent.is_dir()) else None
    if local or alike is not None:
        hint = (
            f"did you mean {str(alike)!r}?" if alike is not None else "pass a folder, or a Hub id such as 'org/name'."
        )
        remote = "" if local else " If you mean the repository on the Hub, pass its `revision`, such as 'main'."
        raise FileNotFoundError(f"No {kind} at {source!r}: there is no such folder here; {hint}{remote}")


def _alike(path: Path, fits: Callable[[Path], bool] | None = None) -> Path | None:
    """A folder that `path` may be a misspelling of: one that `fits`, by default one of something saved."""
    parent = path.parent if path.parent.is_dir() else _alike(path.parent, Path.is_dir)
    if parent is None:
        return None
    names = [each.name for each in parent.iterdir() if _digits(each.name) == _digits(path.name)]
    close = difflib.get_close_matches(path.name, names, n=len(names) or 1, cutoff=0.8)
    return next(filter(fits or _is_saved, (parent / name for name in close)), None)


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "steering_vectors.json"))


def _digits(name: str) -> str:
    return "".join(filter(str.isdigit, name))
