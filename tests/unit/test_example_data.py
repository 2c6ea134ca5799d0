"""Prompts and judges of the example recipes."""

import random
from collections import Counter
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from examples import arithmetic, sentiment
from hf_value_steer.files.marked import read_marked
from hf_value_steer.files.references import PREFIX, resolve
from hf_value_steer.judges import load_judge
from hf_value_steer.judges.prompt import Prompt
from hf_value_steer.recipe.sections import Steps
from hf_value_steer.training.prompts import load_prompts


ROOT = Path(__file__).parents[2]
RECIPES = ("smollm2-sentiment", "smollm2-arithmetic", "never-a-number")
SENTIMENT_JUDGES = ("minilm_negative", "vader_negative", "other_reviews_negative")
POSITIVE = "is a wonderful and moving film, beautifully acted, one of the best of the year."
NEGATIVE = "is a dull and boring mess, badly acted, a terrible waste of time."


@pytest.fixture
def few_reviews(monkeypatch, tmp_path):
    """Judges that learn from a twentieth of the reviews, in a cache folder of their own."""
    few = sentiment.all_reviews()[::20]
    monkeypatch.setenv("HF_VALUE_STEER_CACHE", str(tmp_path))
    monkeypatch.setattr(sentiment, "all_reviews", lambda: few)
    monkeypatch.setattr(sentiment, "EXCERPTS", 0)
    fitted = (sentiment.minilm_weights, sentiment.words_model)
    for each in fitted:
        each.cache_clear()
    yield tmp_path
    for each in fitted:
        each.cache_clear()


def test_every_review_has_one_use():
    reviews = sentiment.all_reviews()
    assert len({review.digest for review in reviews}) == len(reviews) == 33_434
    uses = [[*sentiment.reviews(use, True), *sentiment.reviews(use, False)] for use in sentiment.USES]
    assert sum(map(len, uses)) == len({review.digest for use in uses for review in use}) == len(reviews)
    assert abs(np.mean([review.negative for review in reviews]) - 0.5) < 0.01
    assert not any("<br" in review.text for review in reviews)


def test_sentiment_prompts_are_disjoint_plain_and_the_same_every_time():
    train, evaluation = sentiment.train_prompts(), sentiment.eval_prompts()
    assert len(set(train)) == len(train) == sentiment.TRAIN_PROMPTS
    assert len(set(evaluation)) == len(evaluation) == sentiment.EVAL_PROMPTS
    assert not set(sentiment.openings("train")) & set(evaluation)
    assert all(len(prompt.split()) == sentiment.PROMPT_WORDS for prompt in train + evaluation)
    assert (sentiment.vader_negative([], train + evaluation) == 0.5).all()
    assert train == sentiment.train_prompts()


def test_excerpts_are_words_in_a_row():
    review = next(review for review in sentiment.all_reviews() if len(review.text.split()) > 100)
    assert review.excerpt() in review.text and len(review.excerpt().split()) == sentiment.EXCERPT_WORDS
    short = sentiment.Review("Short but sweet.", False, True, "0" * 64)
    assert short.excerpt() == short.text


def test_sentiment_judges_tell_bad_from_good(few_reviews):
    prompts = [Prompt("This film")] * 3
    for name in SENTIMENT_JUDGES:
        bad, good, empty = load_judge(f"python:examples.sentiment:{name}")(prompts, [NEGATIVE, POSITIVE, ""])
        assert bad > 0.6 and good < 0.4 and 0 <= empty <= 1, name


def test_a_fitted_label_judge_is_read_again(few_reviews, monkeypatch):
    monkeypatch.setattr(
        sentiment, "fit_minilm", lambda texts, _labels: {"weights": [0.1] * 384, "bias": len(texts) / 1e4}
    )
    before = sentiment.minilm_negative([], [NEGATIVE, POSITIVE])
    assert [path.suffix for path in few_reviews.iterdir()] == [".json"]
    sentiment.minilm_weights.cache_clear()
    monkeypatch.setattr(sentiment, "fit_minilm", None)
    assert (sentiment.minilm_negative([], [NEGATIVE, POSITIVE]) == before).all()
    sentiment.minilm_weights.cache_clear()
    monkeypatch.setattr(sentiment, "EXCERPTS", 1)
    with pytest.raises(TypeError):  # other texts are other weights
        sentiment.minilm_negative([], [NEGATIVE])


def test_embeddings_do_not_depend_on_the_batch():
    texts = ["a short one", POSITIVE, "a text that is longer than the others, " * 4, NEGATIVE, ""]
    together = sentiment.embeddings(texts)
    assert np.allclose(together, np.concatenate([sentiment.embeddings([text]) for text in texts]), atol=1e-5)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_problems_have_the_right_answers():
    for problem in arithmetic.problems():
        question = problem["prompt"][-1]["content"].removeprefix("What is ").removesuffix("?")
        first, sign, second = question.split()
        assert eval(question) == int(problem["answer"])
        assert problem["operator"] == sign and problem["digits"] == f"{len(first)}x{len(second)}"
    for example, answer in arithmetic.EXAMPLES:
        assert eval(example) == answer


def test_problems_are_split_and_the_same_every_time():
    train, evaluation = (load_prompts(f"python:examples.arithmetic:{name}_problems") for name in ("train", "eval"))
    assert len(train) == arithmetic.TRAIN_PROBLEMS and len(evaluation) == arithmetic.EVAL_PROBLEMS
    texts = [prompt.text for prompt in train + evaluation]
    assert len(set(texts)) == len(texts)
    assert not set(texts) & {message["content"] for message in train[0].messages[:-1]}
    assert arithmetic.problems.__wrapped__() == arithmetic.problems()
    assert arithmetic.problems.__wrapped__(seed=1) != arithmetic.problems()
    cells = [Counter(arithmetic.cell(prompt.columns) for prompt in prompts) for prompts in (train, evaluation)]
    assert set(cells[0]) == set(cells[1]) and len(cells[0]) == 15
    assert max(abs(cells[0][each] / len(train) - cells[1][each] / len(evaluation)) for each in cells[0]) < 0.04


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("23 + 45 = 68", "68"),
        ("The answer is 14.", "14"),
        ("It is -5", "-5"),
        ("12 - 30 = \u221218", "-18"),
        ("17-9", "9"),
        ("(8)-7", "7"),
        ("836 * 7 = 5,852.", "5852"),
        ("1,234,567", "1234567"),
        ("3, 4,5", "5"),
        ("12,3456", "3456"),
        ("14.50 or so", "14.5"),
        ("x2", "2"),
        ("no idea", None),
        ("", None),
    ],
)
def test_how_numbers_are_read(text, number):
    assert arithmetic.last_number(text) == (None if number is None else Decimal(number))


def test_correct_is_about_the_last_number():
    judge = load_judge("python:examples.arithmetic:correct")
    prompts = [Prompt("What is 23 + 45?", {"answer": "68"})] * 5
    responses = ["23 + 45 = 68", "68.0", "68 is not 69", "it is sixty-eight", "-68"]
    assert judge(prompts, responses).tolist() == [1, 1, 0, 0, 0]
    assert judge([Prompt("What is 3 - 5?", {"answer": "-2"})], ["3 - 5 = -2"]).tolist() == [1]


def problems_of(cells):
    return [Prompt(f"{i}", {"operator": sign, "digits": digits}) for i, (sign, digits) in enumerate(cells)]


def test_the_table_answers_its_best_cells_first():
    easy, middle, hard = ("+", "1x1"), ("-", "1x1"), ("*", "3x2")
    known = problems_of([easy] * 4 + [middle] * 4 + [hard] * 4)
    verdicts = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert arithmetic.accuracy_table(known, verdicts) == {easy: 1, middle: 0.5, hard: 0}
    asked = problems_of([hard] * 6 + [easy] * 2 + [middle] * 2)
    answers = [1, 0, 0, 0, 0, 0, 1, 0, 1, 1]

    def accuracy(coverage):
        return arithmetic.table_baseline(known, verdicts, asked, answers, coverage)

    assert accuracy(0.2) == 0.5  # the two easy ones
    assert accuracy(0.3) == pytest.approx(2 / 3)  # and half of what the two in the middle give
    assert accuracy(1.0) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="coverage"):
        accuracy(0.0)


def test_a_predictor_that_knows_nothing_has_the_accuracy_of_all():
    verdicts = np.array([1.0, 0, 0, 1, 0])
    for coverage in (0.1, 0.5, 1.0):
        assert arithmetic.accuracy_at_coverage(np.zeros(5), verdicts, coverage) == pytest.approx(0.4)
    scores = np.array([random.Random(0).random() for _ in range(5)])
    assert arithmetic.accuracy_at_coverage(scores, verdicts, 1.0) == pytest.approx(0.4)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_what_is_there(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    steps = Steps(read_marked(ROOT / "examples" / "recipes" / f"{name}.yaml"))
    assert load_prompts(steps.collect.prompts)
    named = [steps.collect.model, steps.evaluate.mask, *steps.label.judges, *steps.evaluate.judges]
    assert all(callable(resolve(each)) for each in named if each and each.startswith(PREFIX))
    assert steps.train.judge == steps.label.judges[0]


def test_numbers_are_found_and_openings_hold_none(monkeypatch):
    monkeypatch.chdir(ROOT)
    judge, openings = load_judge("lexicon:examples/recipes/numbers.txt"), load_prompts("examples/recipes/openings.txt")
    texts = ["in 1984", "Twenty-one guests", "two", "hundreds of birds", "no one of them", "tenor and often", "weight"]
    assert judge(openings[: len(texts)], texts).tolist() == [1, 1, 1, 1, 0, 0, 0]
    lines = [prompt.text for prompt in openings]
    assert len(set(lines)) == len(lines) >= 100
    assert judge(openings, lines).max() == 0
