"""The release check names files of an archive that are not the commit's, and shows what a failed command said."""

import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import release_check


COMMIT = {"hf_value_steer/__init__.py", "hf_value_steer/py.typed", "hf_value_steer/evaluation/page.css", "README.md"}


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Make a wheel and an sdist that hold some files."""
    monkeypatch.setattr(
        release_check, "tracked", lambda *folders: {each for each in COMMIT if each.startswith(folders or "")}
    )

    def make(in_wheel, in_sdist):
        wheel, sdist, file = tmp_path / "a.whl", tmp_path / "a.tar.gz", tmp_path / "file"
        file.touch()
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in in_wheel:
                archive.write(file, name)
        with tarfile.open(sdist, "w:gz") as archive:
            for name in in_sdist:
                archive.add(file, f"package-1.0/{name}")
        return wheel, sdist

    return make


PACKAGE = sorted(COMMIT - {"README.md"})
WHEEL, SDIST = [*PACKAGE, "hf_value_steer-1.0.dist-info/METADATA"], [*COMMIT, "PKG-INFO"]


def test_what_a_commit_makes_passes(archives):
    release_check.look_into(*archives(WHEEL, SDIST))


@pytest.mark.parametrize(
    "in_wheel, in_sdist, said",
    [
        (WHEEL[1:], SDIST, r"wheel .* lacks \['hf_value_steer/__init__.py'\]"),
        ([*WHEEL, "tests/stray.py"], SDIST, r"wheel holds what it should not: \['tests/stray.py'\]"),
        (WHEEL, SDIST[:-1], r"sdist .* lacks \['PKG-INFO'\]"),
        (WHEEL, [*SDIST, ".venv/bin/python"], r"sdist holds what it should not: \['.venv/bin/python'\]"),
    ],
)
def test_what_is_stray_or_missing_is_named(archives, in_wheel, in_sdist, said):
    with pytest.raises(SystemExit, match=said):
        release_check.look_into(*archives(in_wheel, in_sdist))


def test_a_command_that_fails_says_why():
    with pytest.raises(SystemExit, match=r"(?s)no such day.*Failed with 3: .* -c"):
        release_check.run(sys.executable, "-c", "print('no such day'); raise SystemExit(3)", cwd=Path.cwd())
