"""What `push`, `export` and `run` are told."""

from dataclasses import dataclass, field

from hf_value_steer.arguments.base import Arguments


@dataclass(kw_only=True)
class CardArguments(Arguments):
    """What only a person can say of a head, for its card."""

    limits: str | None = field(default=None, metadata={"help": "where the head fails, in Markdown"})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Hub ids of the data sets behind it"})
    license: str | None = field(
        default=None, metadata={"help": "license of the head, as the Hub names it, for instance apache-2.0"}
    )


@dataclass(kw_only=True)
class UploadArguments(CardArguments):
    """Where a head is uploaded to, and how."""

    repo_id: str = field(metadata={"help": "repository on the Hub, made if it is not there", "positional": True})
    accept_limits: bool = field(default=False, metadata={"help": "publish without a word on limits"})
    private: bool | None = field(default=None, metadata={"help": "make the repository private"})
    dry_run: bool = field(default=False, metadata={"help": "show every file and the card, upload nothing"})


@dataclass(kw_only=True)
class PushArguments(UploadArguments):
    """What is uploaded."""

    folder: str = field(metadata={"help": "folder of the head", "positional": True})
    evaluation: str | None = field(default=None, metadata={"help": "folder with evaluation.json and report.html"})


@dataclass(kw_only=True)
class RecipePushArguments(UploadArguments):
    """What section `push` of a recipe holds: head and evaluation are those of the recipe."""

    token: str | None = field(
        default=None, metadata={"help": "access token of the Hub; by default that of `hf auth login`"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch to push to"})
    commit_message: str | None = field(default=None, metadata={"help": "message of the commit"})
    create_pr: bool = field(default=False, metadata={"help": "open a pull request instead of committing"})


@dataclass(kw_only=True)
class ExportArguments(Arguments):
    """Where the repository is written."""

    folder: str = field(metadata={"help": "folder to write", "positional": True})


@dataclass(kw_only=True)
class RunArguments(Arguments):
    """What is run."""

    recipe: str = field(metadata={"help": "a YAML file", "positional": True})
