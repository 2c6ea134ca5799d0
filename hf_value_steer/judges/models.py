"""Judges that are sequence-classification models of `transformers`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_value_steer.judges.base import Judge
from hf_value_steer.judges.prompt import Prompt


class ModelJudge(Judge):
    """A model with tokenizer, and how it reads texts of any length in batches.

    Args:
        spec (`str`): name of the judge.
        name (`str`): Hub id or folder of the model.
        batch_size (`int`): rows of a forward pass; 1 is used for a model that knows no padding token.
        device (`str`, *optional*): by default a CUDA device if there is one.

    Raises:
        ValueError: if there is no such model, or it has no weights for classification.
    """

    def __init__(self, spec: str, name: str, batch_size: int, device: str | None):
        super().__init__(spec)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model, info = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"Judge {spec!r} cannot be loaded: {error}") from error
        if info["missing_keys"]:  # they would be random
            missing = ", ".join(sorted(map(str, info["missing_keys"])))
            raise ValueError(f"Judge {spec!r}: {name} is no sequence-classification model, it lacks {missing}.")
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).eval()
        text_config = model.config.get_text_config()
        # A decoder is read at the last token that is no padding, by the model's id of it.
        self.batch_size = 1 if text_config.pad_token_id is None else batch_size
        if text_config.pad_token_id is not None:
            self.tokenizer.pad_token_id = text_config.pad_token_id
        self.tokenizer.padding_side = "right"
        positions = getattr(text_config, "max_position_embeddings", None)  # not every architecture has a limit
        self.max_length: int = min(self.tokenizer.model_max_length, positions or 10**6)

    @torch.inference_mode()
    def logits(self, *texts: list[str], special_tokens: bool = True) -> Tensor:
        """One row of logits for each text, or pair of texts: `(n, labels)`, float32, on the CPU."""
        encode: dict[str, Any] = {"add_special_tokens": special_tokens, "verbose": False}
        lengths = np.array([len(row) for row in self.tokenizer(*texts, **encode)["input_ids"]])
        if not lengths.all():
            raise ValueError("the tokenizer makes no token of an empty text, and this model cannot read none")
        self.truncated += int((lengths > self.max_length).sum())
        encode |= {"truncation": True, "max_length": self.max_length, "padding": self.batch_size > 1}
        order = np.argsort(lengths, kind="stable")  # rows of like length together: less padding
        parts = []
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self.tokenizer(*([column[row] for row in rows] for column in texts), **encode, return_tensors="pt")
            parts.append(self.model(**batch.to(self.device)).logits.float().cpu())
        return torch.cat(parts)[torch.from_numpy(np.argsort(order))]


class ClassifierJudge(ModelJudge):
    """`classifier:MODEL#LABEL`: probability of a label, by a text-classification model that reads the response only.

    The probability is a sigmoid for models of one label or with `problem_type="multi_label_classification"`, else a
    softmax. `#LABEL` may be left out for one label, or for two: then it is the one with index 1. A response that is
    longer than the model can read is cut at its end, and counted in `truncated`.

    Args:
        spec (`str`): name of the judge.
        target (`str`): `MODEL` or `MODEL#LABEL`.
        batch_size, device: as in [`ModelJudge`].

    Raises:
        ValueError: if there is no such model or label, or the model answers with a number that is no probability.
    """

    def __init__(self, spec: str, target: str, batch_size: int, device: str | None):
        name, separator, label = target.partition("#")
        super().__init__(spec, name, batch_size, device)
        config = self.model.config
        labels = {text: index for index, text in config.id2label.items()}
        if config.problem_type == "regression":
            raise ValueError(f"Judge {spec!r}: {name} was trained for regression; use `reward:{name}`.")
        if label not in labels if separator else config.num_labels > 2:
            raise ValueError(f"Judge {spec!r}: name one of the labels of {name} after a `#`: {', '.join(labels)}.")
        self.label = labels[label] if separator else config.num_labels - 1
        self.sigmoid = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        self.tokenizer.truncation_side = "right"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:  # noqa: ARG002
        logits = self.logits(list(responses))
        return (logits.sigmoid() if self.sigmoid else logits.softmax(dim=-1))[:, self.label]


class RewardJudge(ModelJudge):
    """`reward:MODEL`: sigmoid of the one output of a model that reads prompt and response.

    They are formatted with the chat template of its tokenizer, or, where it has none, encoded as a pair of texts.
    The sigmoid is the probability that the response is preferred to one of reward zero (Bradley-Terry). What is longer
    than the model can read is cut at its beginning, and counted in `truncated`.

    Args:
        spec (`str`): name of the judge.
        name (`str`): Hub id or folder of the model.
        batch_size, device: as in [`ModelJudge`].

    Raises:
        ValueError: if there is no such model, or it has several outputs.
    """

    def __init__(self, spec: str, name: str, batch_size: int, device: str | None):
        super().__init__(spec, name, batch_size, device)
        if self.model.config.num_labels != 1:
            raise ValueError(
                f"Judge {spec!r}: {name} has {self.model.config.num_labels} outputs, a reward model has one; "
                f"use `classifier:{name}#LABEL`."
            )
        self.tokenizer.truncation_side = "left"

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        if self.tokenizer.chat_template is None:
            rewards = self.logits([prompt.text for prompt in prompts], list(responses))
        else:
            chats = [self._chat(*pair) for pair in zip(prompts, responses, strict=True)]
            rewards = self.logits(chats, special_tokens=False)
        return rewards[:, 0].sigmoid()

    def _chat(self, prompt: Prompt, response: str) -> str:
        asked = prompt.messages or [{"role": "user", "content": prompt.text}]
        messages: list[Any] = [*asked, {"role": "assistant", "content": response}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
