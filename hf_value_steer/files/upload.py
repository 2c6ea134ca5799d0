"""The way to the Hub: one commit for all that belongs together, and no word of a person overwritten."""

import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from yaml import YAMLError


# Whole lines, and the last of them: what a config says is within a line, and before the limits.
LIMITS = re.compile(r"(?s:.*)^<!-- limits[^>\n]*-->\n((?s:.*?))\n<!-- /limits -->$", re.MULTILINE)


def push(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with hf-value-steer",
    create_pr: bool = False,
    replace_generated: bool = False,
) -> str:
    """Upload what `save` writes into a folder as one commit; a README that is there already is kept.

    `transformers` itself would put its blank model card in place of ours.

    Args:
        save: writes the files.
        repo_id: repository, made if it is not there.
        private, token, revision, commit_message, create_pr: as in [`~huggingface_hub.HfApi.create_commit`].
        replace_generated (`bool`): put the README of `save` in the place of one that was generated.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: if the README of `save` names a backbone that is not on the Hub, see [`check_base_model`].
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as folder, TemporaryDirectory() as there:
        save(Path(folder))
        if (card := Path(folder) / "README.md").exists():
            check_base_model(card.read_text(encoding="utf-8"))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        kept = ["README.md"] if api.file_exists(repo_id, "README.md", revision=revision) else None
        if kept and replace_generated:
            old = api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=there)
            kept = None if is_generated(Path(old).read_text(encoding="utf-8")) else kept
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            ignore_patterns=kept,
        )
    return str(commit.commit_url)


def is_generated(card: str) -> bool:
    """Whether the text of a card was generated, so that all but its limits can be generated again."""
    return LIMITS.search(card) is not None


def check_base_model(card: str) -> None:
    """Raise a `ValueError` if the `base_model` of a card is no Hub id, but a folder of this machine, say."""
    if not card.lstrip().startswith("---"):
        return
    try:
        named = ModelCard(card, ignore_metadata_errors=True).data.get("base_model")
    except YAMLError as error:
        raise ValueError(f"README.md has to begin with metadata in YAML: {error}") from error
    for name in [named] if isinstance(named, str) else named or []:
        check_hub_id(name, "`base_model` of the card")


def check_hub_id(name: str, what: str) -> None:
    """Raise a `ValueError` unless others find a backbone under this name: an id of the Hub, and no path here."""
    if not _is_hub_id(name) or Path(name).exists():
        raise ValueError(
            f"{what} is {name!r}, which is not on the Hub, so nobody else could load the backbone. Name its Hub id: "
            "in a new collection with `hf-value-steer collect --backbone org/name`, in what is trained already under "
            "`backbone` of its config (config.json, steering_vectors.json), in a card of your own under `base_model`."
        )


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
