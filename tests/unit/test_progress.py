"""One logger for warnings and progress."""

import logging

import pytest

from hf_value_steer.progress import logger, progress


@pytest.mark.parametrize(
    "level, hidden, shown",
    [(logging.WARNING, False, True), (logging.ERROR, False, False), (logging.WARNING, True, False)],
)
def test_the_logger_silences_bars(capsys, level, hidden, shown):
    before = logger.level
    logger.setLevel(level)
    try:
        assert list(progress(range(3), "counting", "number", hidden)) == [0, 1, 2]
    finally:
        logger.setLevel(before)
    assert ("counting" in capsys.readouterr().err) == shown
