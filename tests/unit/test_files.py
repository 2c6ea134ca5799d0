"""Files that the pipeline writes and reads."""

import math

import pytest

from hf_value_steer.files.writing import claim, write_json


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("write", [write_json, claim])
def test_what_json_does_not_know_is_never_written(tmp_path, number, write):
    with pytest.raises(ValueError, match=r"file\.json would hold NaN or infinity"):
        write(tmp_path / "file.json", {"metrics": [1.0, {"auroc": number}]})
    assert not list(tmp_path.iterdir())
