"""Judges: how they are named, what those without a model answer, and that no failure of one passes for a label."""

import json
import sys

import numpy as np
import pytest

from hf_value_steer.judges import agreement, load_judge
from hf_value_steer.judges.prompt import Prompt


def prompts(count, **columns):
    return [Prompt("one question", columns)] * count


@pytest.fixture
def lexicon(tmp_path):
    def make(*lines, encoding="utf-8"):
        path = tmp_path / "words.lexicon"
        path.write_text("\n".join(lines), encoding=encoding)
        return load_judge(f"lexicon:{path}")

    return make


@pytest.fixture
def function(tmp_path, monkeypatch):
    """Make the judge `python:own_judges:judge` from the source of its body."""

    def make(body):
        (tmp_path / "own_judges.py").write_text(f"import numpy, torch\ndef judge(prompts, responses):\n    {body}\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.delitem(sys.modules, "own_judges", raising=False)
        return load_judge("python:own_judges:judge")

    yield make
    sys.modules.pop("own_judges", None)


# Specifications


@pytest.mark.parametrize("spec", ["", "lexicon", "lexicon:", "toxicity", "python:", "classifier:", "reward", "llm:"])
def test_a_spec_that_names_nothing_is_told_the_form(spec):
    kind = spec.partition(":")[0]
    forms = "one of lexicon:PATH, classifier:MODEL" if kind in ("", "toxicity") else f"{kind}:[A-Zm]"
    with pytest.raises(ValueError, match=f"'{spec}' names no judge; expected {forms}"):
        load_judge(spec)


@pytest.mark.parametrize("spec", ["llm:localhost:8000#m", "llm:http://localhost/v1", "llm:http://localhost/v1#"])
def test_an_llm_spec_needs_an_address_and_a_model(spec):
    with pytest.raises(ValueError, match=r"expected llm:URL#MODEL\[#TEMPLATE\]"):
        load_judge(spec)


def test_a_secret_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as caught:
        load_judge("llm:https://me:hidden@localhost/v1#m")
    assert "hidden" not in str(caught.value)


# Lexicons


def test_words_and_phrases_match_whole_and_without_case(lexicon):
    judge = lexicon("cat", "", "big dog", "c++")
    expected = {"A Cat!": 1, "cats": 0, "concat": 0, "big\n dog": 1, "big dogs": 0, "I write C++.": 1, "": 0}
    scores = judge(prompts(len(expected)), list(expected))
    assert scores.tolist() == list(expected.values()) and scores.dtype == np.float32


def test_regular_expressions_are_searched_as_they_stand(lexicon):
    judge = lexicon(r"/ca+t/", r"/^so/", r"/(a)(b)\1/")
    assert judge(prompts(5), ["conCAAATs", "ct", "so it is", "not so", "xabax"]).tolist() == [1, 0, 1, 0, 1]


def test_an_attribute_nobody_prepared_needs_no_python(lexicon):
    mentions_a_number = lexicon(r"/\d/", *"zero one two three four five six seven eight nine ten dozen".split())
    texts = ["It is 7 o'clock", "a dozen eggs", "Nobody knows.", "the bone of a stone", "the 3rd man", "Ten!"]
    assert mentions_a_number(prompts(6), texts).tolist() == [1, 1, 0, 0, 1, 1]


def test_the_first_word_survives_a_byte_order_mark(lexicon):
    assert lexicon("cat", encoding="utf-8-sig")(prompts(1), ["cat"]).tolist() == [1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([" ", ""], "holds no word"),
        (["", "/(/"], "line 2 of .* is no regular expression"),
        (["/a*/"], "line 1 of .* matches the empty text"),
        (["//"], "matches the empty text"),
    ],
)
def test_a_lexicon_that_cannot_judge_is_refused(lexicon, lines, message):
    with pytest.raises(ValueError, match=message):
        lexicon(*lines)


def test_a_missing_lexicon_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_judge(f"lexicon:{tmp_path / 'absent'}")


# Functions, and the checks of every judge's answers


@pytest.mark.parametrize(
    "body",
    [
        "return [0, 0.5, True]",
        "return numpy.array([0, 0.5, 1], dtype=numpy.float16)",
        "return [numpy.float32(0), numpy.float64(0.5), numpy.bool_(True)]",
        "return torch.tensor([0, 0.5, 1], dtype=torch.bfloat16, requires_grad=True)",
        "return (len(response) / 2 for response in responses)",
        "return [-1e-9, 0.5, 1 + 1e-9]",  # rounding
    ],
)
def test_a_function_may_answer_in_many_forms(function, body):
    scores = function(body)(prompts(3), ["", "a", "ab"])
    assert scores.tolist() == [0, 0.5, 1] and scores.dtype == np.float32


def test_a_function_sees_prompts_with_their_columns(function):
    judge = function("return [p.columns['x'] * (p.text == 'one question') for p in prompts]")
    assert judge(prompts(2, x=0.25), ["a", "b"]).tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [0, 1.5, 2]", "answered 1.5 to response 1 of 3"),
        ("return [0, 1, -0.01]", "answered -0.01 to response 2 of 3"),
        ("return [0, 1, float('nan')]", "answered nan to response 2 of 3"),
        ("return torch.tensor([torch.inf, 0, 0])", "answered inf to response 0 of 3"),
        ("return [0, None, 1]", "answered None to response 1 of 3"),
        ("return ['0', '1', '1']", "answered '0' to response 0 of 3"),
        ("return numpy.zeros((3, 1))", r"answered \[0.0\] to response 0 of 3"),
        ("return [0, 1]", "gave 2 answers to 3 responses"),
        ("return numpy.zeros(4)", "gave 4 answers to 3 responses"),
        ("pass", "answered None, expected 3 numbers"),
        ("return numpy.array(0.5)", "answered 0.5, expected 3 numbers"),
    ],
)
def test_an_answer_that_is_no_score_is_refused(function, body, message):
    with pytest.raises(ValueError, match=f"Judge 'python:own_judges:judge' {message}"):
        function(body)(prompts(3), ["a", "b", "c"])


def test_a_judge_that_raises_is_named_and_its_error_kept(function):
    with pytest.raises(RuntimeError, match="Judge 'python:own_judges:judge' failed: ZeroDivisionError") as caught:
        function("return 1 / 0")(prompts(1), ["a"])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_nothing_to_judge_is_no_call_and_lengths_have_to_agree(function):
    judge = function("raise AssertionError('called')")
    assert judge([], []).shape == (0,)
    with pytest.raises(ValueError, match="differ in length: 1 and 2"):
        judge(prompts(1), ["a", "b"])


@pytest.mark.parametrize("name", ["absent_module:judge", "own_judges:absent", "own_judges", "own_judges:numpy"])
def test_a_missing_function_is_refused(function, name):
    function("return []")
    with pytest.raises(ValueError, match=f"python:{name}' (cannot be found|is no reference|is no function)"):
        load_judge(f"python:{name}")


# Right answers


@pytest.mark.parametrize(
    ("answer", "response", "correct"),
    [
        ("42", " 40 + 2 = 42.\n", 1),
        (42, "The answer is 43.", 0),
        ("42", "I do not know.", 0),
        ("42", "", 0),
        (1000, "1,000", 1),
        (0.5, r"It is $\frac{1}{2}$.", 1),
        (1e-05, "0.00001", 1),
        (r"2\sqrt{3}", r"so $\sqrt{12}$", 1),
        (r"2\sqrt{3}", "so 2", 0),
        (r"$\frac{3}{4}$", r"\boxed{0.75}", 1),
        ("Half of $10 is $\\boxed{5}$.\n#### 8", "8", 1),
        ("Half of $10 is $\\boxed{5}$.\n#### 8", "5", 0),
    ],
)
def test_the_final_answer_is_compared_as_mathematics(answer, response, correct):
    assert load_judge("math:solution")(prompts(1, solution=answer), [response]).tolist() == [correct]


def test_the_answer_is_in_the_column_answer_by_default():
    judge = load_judge("math:")
    assert judge(prompts(2, answer="3"), ["3", "4"]).tolist() == [1, 0]
    with pytest.raises(RuntimeError, match=r"'one question' has no column 'answer', only \['solution'\]"):
        judge(prompts(1, solution="3"), ["3"])


@pytest.mark.parametrize("answer", ["", "??", "()"])
def test_a_right_answer_that_cannot_be_read_is_an_error(answer):
    with pytest.raises(RuntimeError, match="column 'answer' of prompt 'one question' is no number or formula"):
        load_judge("math")(prompts(1, answer=answer), ["3"])


def test_math_verify_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r'needs math_verify: pip install "hf-value-steer\[train\]"'):
        load_judge("math:answer")


# Agreement


def test_agreement_of_every_two_judges():
    scores = {
        "a": np.array([0.9, 0.8, 0.1, 0.2]),
        "b": np.array([1.0, 0.0, 0.0, 0.5]),  # 0.5 is not above 0.5
        "never": np.zeros(4),
    }
    found = agreement(scores)
    assert found["a"]["b"] == {"kappa": pytest.approx(0.5), "auroc": 1.0}
    assert found["b"]["a"] == {"kappa": pytest.approx(0.5), "auroc": pytest.approx(0.625)}
    assert found["a"]["never"] == {"kappa": None, "auroc": None}
    assert found["never"]["a"] == {"kappa": None, "auroc": 0.5}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert agreement({"a": scores["a"]}) == {"a": {}}


def test_agreement_needs_the_same_responses():
    with pytest.raises(ValueError, match="of one length, got a: 2, b: 3"):
        agreement({"a": np.zeros(2), "b": np.zeros(3)})


def test_agreement_asks_for_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"agreement of judges needs sklearn.metrics: pip install"):
        agreement({"a": np.zeros(2)})
