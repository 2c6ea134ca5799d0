"""Offline, quiet, and with the models that several tests share."""

import os
import signal


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from examples.smollm2 import load_backbone
from hf_value_steer import disable_value_steer
from tests.families import build


torch.set_num_threads(1)  # the models are tiny
# Else what tests start in the background of a script ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
logging.disable_progress_bar()
logging.set_verbosity_error()


@pytest.fixture(scope="session")
def backbone_and_tokenizer() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_backbone(torch.float32)


@pytest.fixture
def smollm2(backbone_and_tokenizer: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> Iterator[PreTrainedModel]:
    yield backbone_and_tokenizer[0]
    disable_value_steer(backbone_and_tokenizer[0])


@pytest.fixture(scope="session")
def tokenizer(
    backbone_and_tokenizer: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> PreTrainedTokenizerBase:
    return backbone_and_tokenizer[1]


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return build("llama")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
