"""What goes to the Hub beside weights: model cards, and the `custom_generate` repository."""

import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from huggingface_hub import HfApi, ModelCard, ModelCardData


if TYPE_CHECKING:
    from hf_value_steer.modeling import ValueHead


LIBRARY_NAME = "hf-value-steer"

_HEAD_CARD = """---
{{ card_data }}
---

# {{ title }}

A value head for `{{ backbone }}`: a {{ architecture }} of {{ parameters }} parameters that reads the feature of each
token (final layer, after the final norm, {{ hidden_size }} wide) and answers with a value in (0, 1).
A high value is **{{ polarity }}**. {{ threshold }}

```python
from transformers import AutoModelForCausalLM
from hf_value_steer import ValueFilterConfig, enable_value_steer

model = enable_value_steer(AutoModelForCausalLM.from_pretrained("{{ backbone }}"))
cfg = ValueFilterConfig(value_head="org/this-head")
out = model.generate(**inputs, value_steer=cfg, do_sample=True)
```

Backbone fingerprint: `{{ fingerprint }}`. Prompt format: `{{ chat_template }}`. Features: `{{ feature_dtype }}`.

## Limits

This card was generated from the head's config. What the head was measured to do, and where it fails, is for its author
to add here. A value head says nothing about text of another backbone, another prompt format or another sampler.
"""

_GENERATE = '''"""Value steering as a `custom_generate` recipe; see the README beside it."""

from hf_value_steer.generate import generate as value_steer_generate


def generate(model, value_steer=None, **kwargs):
    if value_steer is None:
        raise ValueError("`value_steer` is missing: pass the dict form of a ValueFilterConfig or AbstentionConfig.")
    return value_steer_generate(model, value_steer=value_steer, **kwargs)
'''

_GENERATE_CARD = """---
library_name: transformers
license: apache-2.0
tags:
- custom_generate
- value-steering
---

# Value-filtered decoding and dynamic abstention

Decoding strategy for any causal language model: a learned value of the hidden state decides, while text is generated,
which tokens are kept ([2605.14746](https://arxiv.org/abs/2605.14746), [2604.18419](https://arxiv.org/abs/2604.18419)).
Needs `pip install hf-value-steer`.

```python
out = model.generate(
    **inputs, custom_generate="org/value-steer", trust_remote_code=True, do_sample=True,
    value_steer={"method": "filter", "value_head": "org/head", "threshold": 0.3, "num_candidates": 8},
)
```

**Arguments**: those of `generate` for greedy search and sampling, and `value_steer`: the dict form of a
`ValueFilterConfig` or an `AbstentionConfig`, or a list of both.
**Output**: that of `generate`; with `return_dict_in_generate=True` also `values`, `prompt_values`, `interventions`,
`candidates_evaluated`, `abstained`, `abstention_step` and `abstention_value`.
"""


def head_card(head: "ValueHead") -> ModelCard:
    """A model card for a value head, generated from its config."""
    config = head.config
    data = ModelCardData(
        library_name=LIBRARY_NAME,
        base_model=config.backbone,
        base_model_relation="adapter" if config.backbone else None,
        tags=["value-head", "value-steering", *([config.attribute] if config.attribute else [])],
    )
    threshold = f"Default threshold: {config.threshold:.4g}." if config.threshold else "It has no default threshold."
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=_HEAD_CARD,
        title=f"Value head: {config.attribute or 'unnamed attribute'}",
        backbone=config.backbone or "an unnamed backbone",
        architecture={"mlp": "three-layer MLP", "linear": "linear map"}[config.architecture],
        parameters=f"{sum(parameter.numel() for parameter in head.parameters()):,}",
        hidden_size=config.hidden_size,
        polarity=config.polarity,
        threshold=threshold,
        fingerprint=config.backbone_fingerprint or "not recorded",
        chat_template=config.chat_template or "not recorded",
        feature_dtype=config.feature_dtype or "not recorded",
    )
    return card


def write_card(head: "ValueHead", folder: Path) -> None:
    """Write the generated card as `README.md`, unless the folder has one, which its author may have edited."""
    path = folder / "README.md"
    if not path.exists():
        head_card(head).save(path)


def push(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with hf-value-steer",
    create_pr: bool = False,
) -> str:
    """Upload what `save` writes into a folder as one commit; a README that is there already is kept.

    `transformers` itself would put its blank model card in place of ours.

    Args:
        save: writes the files.
        repo_id: repository, made if it is not there.
        private, token, revision, commit_message, create_pr: as in [`~huggingface_hub.HfApi.create_commit`].

    Returns:
        The URL of the commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    kept = ["README.md"] if api.file_exists(repo_id, "README.md", revision=revision) else None
    with TemporaryDirectory() as folder:
        save(Path(folder))
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            ignore_patterns=kept,
        )
    return str(commit.commit_url)


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
    (root / "README.md").write_text(_GENERATE_CARD, encoding="utf-8")
    return root
