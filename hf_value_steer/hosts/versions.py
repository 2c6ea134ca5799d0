"""Which transformers this library runs on. Nothing here imports it: the answer has to come before that could fail."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet


SUPPORTED = ">=5.17,<5.25"  # as in pyproject.toml, whose ends are tested


def refuse_other_transformers() -> None:
    """Raise an `ImportError` that names the supported range, if another version is installed."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or not SpecifierSet(SUPPORTED).contains(found, prereleases=True):
        raise ImportError(
            f"hf-value-steer needs transformers{SUPPORTED}, found {found}: it works inside `generate`, which other "
            f'versions change. Install one with `pip install "transformers{SUPPORTED}"`.'
        )
