"""The way to the Hub: heads with all that belongs to them, and the `custom_generate` repository."""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError

from hf_value_steer.cards import head as cards
from hf_value_steer.cards.head import NO_LIMITS, lacks_limits
from hf_value_steer.cards.parts import LIBRARY_NAME
from hf_value_steer.errors import UploadError
from hf_value_steer.files.reading import read_record
from hf_value_steer.files.upload import check_base_model, is_generated, push
from hf_value_steer.heads.value_head import ValueHead


__all__ = [
    "PushedHead",
    "UploadError",
    "export_custom_generate",
    "head_card",
    "push",
    "push_head",
    "renew_card",
    "write_card",
]

_GENERATE = '''"""Value steering as a `custom_generate` recipe; see the README beside it."""

from hf_value_steer.generate import generate as value_steer_generate


def generate(model, value_steer=None, **kwargs):
    if value_steer is None:
        raise ValueError("`value_steer` is missing: pass the dict form of a ValueFilterConfig or AbstentionConfig.")
    return value_steer_generate(model, value_steer=value_steer, **kwargs)
'''


def head_card(head: ValueHead, *known: Any, **said: Any) -> ModelCard:
    """The card of a head, with what else is known of it; see [`~hf_value_steer.cards.head.head_card`]."""
    return cards.head_card(head.facts(), *known, **said)


def write_card(head: ValueHead, folder: Path) -> None:
    """Write the generated card as `README.md`, unless the folder has one, which its author may have edited."""
    cards.write_card(head.facts(), folder)


def renew_card(head: ValueHead, card: str | None, *known: Any, **said: Any) -> str:
    """The text of a card generated anew; see [`~hf_value_steer.cards.head.renew_card`]."""
    return cards.renew_card(head.facts(), card, *known, **said)


@dataclass(frozen=True)
class PushedHead:
    """What [`push_head`] uploads.

    Args:
        repo_id (`str`): where to.
        files (`dict`): size in bytes and SHA-256 of each file.
        card (`str`): the text of `README.md`.
        url (`str`, *optional*): the commit; `None` after a dry run.
    """

    repo_id: str
    files: dict[str, tuple[int, str]]
    card: str
    url: str | None = None

    def __str__(self) -> str:
        lines = [f"{name:<20}{size:>14,} bytes  sha256 {digest}" for name, (size, digest) in self.files.items()]
        head = f"{self.repo_id}: {self.url or 'dry run, nothing was uploaded'}"
        return "\n".join([head, *lines, "", "README.md:", "", self.card])


def push_head(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    limits: str | None = None,
    accept_limits: bool = False,
    evaluation: str | os.PathLike[str] | None = None,
    datasets: Sequence[str] | None = None,
    license: str | None = None,
    dry_run: bool = False,
    **options: Any,
) -> PushedHead:
    """Upload a head with its calibration, its evaluation and its card as one commit. The folder is never changed.

    The card is generated anew, with the limits, license and data sets of the folder's `README.md` where they are not
    given. A `README.md` that was not generated is uploaded as it is.

    Args:
        folder: holds `config.json`, `model.safetensors` and, if there are, `README.md` and `calibration.json`.
        repo_id (`str`): repository, made if it is not there. A card on the Hub that was not generated is kept.
        limits (`str`, *optional*): where the head fails, in Markdown.
        accept_limits (`bool`): publish without a word of a person on limits, and let the card say so.
        evaluation (folder, *optional*): holds `evaluation.json` and, if it is to be uploaded, `report.html`.
        datasets, license: as in [`head_card`].
        dry_run (`bool`): upload nothing, ask the Hub for nothing.
        options: `private`, `token`, `revision`, `commit_message`, `create_pr`, as in [`push`].

    Raises:
        ValueError: if a file is missing or corrupt, if the evaluation is of another head, if nobody has written or
            accepted the limits, or if the backbone that the card names is not on the Hub, see [`check_base_model`].
        UploadError: if the upload did not complete. Repeat it: a commit is there as a whole or not at all.
    """
    root = Path(folder)
    files = _files(root, None if evaluation is None else Path(evaluation))
    document = _read_evaluation(files["evaluation.json"]) if evaluation is not None else None
    said = {"datasets": datasets, "license": license, "repo_id": repo_id}
    card = _card_to_push(root, document, limits or None, accept_limits, said)
    facts = {name: _fact(path.read_bytes()) for name, path in files.items()} | {"README.md": _fact(card.encode())}
    planned = PushedHead(repo_id, dict(sorted(facts.items())), card)
    if dry_run:
        return planned

    def save(target: Path) -> None:
        (target / "README.md").write_bytes(card.encode())
        for name, path in files.items():
            shutil.copyfile(path, target / name)

    try:
        url = push(save, repo_id, replace_generated=True, **options)
    except (HFValidationError, TypeError):  # wrong arguments
        raise
    except Exception as error:
        raise UploadError(
            f"The upload to {repo_id} did not complete: {error}\n{root} is as it was. If the token was refused, log "
            "in with `hf auth login` or pass `token`. Then push again: a commit is there as a whole or not at all."
        ) from error
    return replace(planned, url=url)


def _card_to_push(
    root: Path, document: dict[str, Any] | None, limits: str | None, accept_limits: bool, said: dict[str, Any]
) -> str:
    """The card of the head in `root`, with limits, or a word that nobody wrote any, and a backbone on the Hub."""
    head, readme = ValueHead.from_pretrained(root), root / "README.md"
    old = readme.read_text(encoding="utf-8") if readme.exists() else None
    card = renew_card(head, old, document, limits=limits, **said)
    if lacks_limits(card):
        if not accept_limits:
            raise ValueError(
                f"Nobody has written the limits of this head: pass `limits`, or write them into {readme} under "
                '"## Limits", or pass `accept_limits=True` to publish without.'
            )
        card = renew_card(head, old, document, limits=NO_LIMITS, **said) if is_generated(card) else card
    check_base_model(card)
    return card


def _files(root: Path, evaluation: Path | None) -> dict[str, Path]:
    """What is uploaded beside the card."""
    files = {name: root / name for name in ("config.json", "model.safetensors")}
    for path in files.values():
        if not path.is_file():
            raise ValueError(f"`folder` has to hold a saved value head, but {path} is not there.")
    optional = [root / "calibration.json"]
    if evaluation is not None:
        files["evaluation.json"] = evaluation / "evaluation.json"
        optional.append(evaluation / "report.html")
    return files | {path.name: path for path in optional if path.exists()}


def _read_evaluation(path: Path) -> dict[str, Any]:
    try:
        return dict(read_record(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"`evaluation` has to be a folder with an evaluation.json, but {error}") from error


def _fact(content: bytes) -> tuple[int, str]:
    return len(content), hashlib.sha256(content).hexdigest()


def export_custom_generate(folder: str | os.PathLike[str]) -> Path:
    """Write a repository for `generate(custom_generate="org/value-steer", trust_remote_code=True)`.

    Args:
        folder: where to write; upload it with `huggingface_hub.upload_folder`.

    Returns:
        The folder.
    """
    root = Path(folder)
    (root / "custom_generate").mkdir(parents=True, exist_ok=True)
    (root / "custom_generate" / "generate.py").write_text(_GENERATE, encoding="utf-8")
    requirement = f"{LIBRARY_NAME}>={version(LIBRARY_NAME)}\n"
    (root / "custom_generate" / "requirements.txt").write_text(requirement, encoding="utf-8")
    shutil.copyfile(Path(cards.__file__).with_name("custom_generate.md"), root / "README.md")
    return root
