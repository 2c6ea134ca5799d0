"""Progress bars; `logging.getLogger("hf_value_steer").setLevel(logging.ERROR)` silences them, and all warnings."""

import logging
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm


logger = logging.getLogger("hf_value_steer")  # every module's warnings go through it, too

_Item = TypeVar("_Item")


def progress(items: Iterable[_Item], description: str, unit: str, hidden: bool = False) -> Iterable[_Item]:
    """`items` with a bar on standard error, unless it is `hidden` or the logger lets no warnings pass."""
    bar: Iterable[_Item] = tqdm(
        items, desc=description, unit=unit, disable=hidden or not logger.isEnabledFor(logging.WARNING)
    )
    return bar
