"""`python:module:function`: how a recipe names something that only code can say."""

import importlib
import sys
from pathlib import Path
from typing import Any


PREFIX = "python:"


def resolve(reference: str) -> Any:
    """What `python:module:name` names; modules of the working directory can be imported, as under `python -m`.

    Raises:
        ValueError: if the reference has another form, there is no such module or name, or importing it fails.
    """
    module, separator, name = reference.removeprefix(PREFIX).partition(":")
    if not (reference.startswith(PREFIX) and module and separator and name):
        raise ValueError(f"{reference!r} is no reference of the form python:module:function.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{reference!r} cannot be found from {here}: {error}.") from error
    except Exception as error:  # the module is the user's: anything
        raise ValueError(f"{reference!r}: importing it raised {type(error).__name__}: {error}.") from error


def model_name(model: str) -> str:
    """A folder or Hub id, as it is or from the function that a `python:` reference names."""
    return str(resolve(model)()) if model.startswith(PREFIX) else model
