"""What `push`, `export` and `run` are told."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class PushArguments:
    """What is uploaded, and what its card says."""

    folder: str = field(metadata={"help": "folder of the head", "positional": True})
    repo_id: str = field(metadata={"help": "repository on the Hub, made if it is not there", "positional": True})
    evaluation: str | None = field(default=None, metadata={"help": "folder with evaluation.json and report.html"})
    limits: str | None = field(default=None, metadata={"help": "where the head fails, for the card"})
    accept_limits: bool = field(default=False, metadata={"help": "publish without a word on limits"})
    datasets: list[str] = field(
        default_factory=list, metadata={"help": "Hub ids of the data sets behind it, for the card"}
    )
    license: str | None = field(default=None, metadata={"help": "of the head, for the card"})
    private: bool | None = field(default=None, metadata={"help": "make the repository private"})
    dry_run: bool = field(default=False, metadata={"help": "show every file and the card, upload nothing"})


@dataclass(kw_only=True)
class ExportArguments:
    """Where the repository is written."""

    folder: str = field(metadata={"help": "folder to write", "positional": True})


@dataclass(kw_only=True)
class RunArguments:
    """What is run."""

    recipe: str = field(metadata={"help": "a YAML file", "positional": True})
