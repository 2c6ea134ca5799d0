"""A judge of text in the place of a head: nothing that it objects to is written, and whatever fails stops the text."""

import re

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, set_seed

from hf_value_steer import (
    AbstentionConfig,
    MismatchError,
    ScoringError,
    TextJudge,
    UnsupportedError,
    ValueFilterConfig,
    ValueFilterLogitsProcessor,
    enable_value_steer,
    value_steer_generate,
)
from hf_value_steer.calibration import Calibration
from hf_value_steer.judges import load_judge
from tests.going_back import Shown
from tests.tiny_text import BAD, save_tiny_model, write_lexicon


LETTERS = [*"abdABD", " ", "."]
WORDS = ["bad", "dab", "ab", "d b"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that writes letter by letter, its tokenizer, and a list of words."""
    folder = tmp_path_factory.mktemp("letters")
    ids = {text: index for index, text in enumerate(["<pad>", "<s>", "</s>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    ).save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(ids), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(5.0)
    model.save_pretrained(folder)
    (folder / "words.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return (
        enable_value_steer(AutoModelForCausalLM.from_pretrained(folder)),
        AutoTokenizer.from_pretrained(folder),
        folder,
    )


def write(world, value_head, rows=50, seed=0, tokens=24, **options):
    """Texts, and what `generate` returned."""
    model, tokenizer, _ = world
    inputs = tokenizer(["ab d", "b"] * (rows // 2), return_tensors="pt", padding=True)
    how = {"do_sample": options.pop("do_sample", True), "max_new_tokens": tokens, "return_dict_in_generate": True}
    how |= {"suppress_tokens": [0, 1, 2], "top_k": options.pop("top_k", 0)}
    streamer = options.pop("streamer", None)
    config = ValueFilterConfig(value_head=value_head, seed=seed, **options)
    set_seed(seed)
    out = model.generate(**inputs, **how, value_steer=config, streamer=streamer)
    return tokenizer.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True), out


def found(text):
    """The whole words of the list in a text, written down once more."""
    spaced = re.sub(r"\s+", " ", text.lower())
    return [word for word in WORDS if re.search(rf"(^|[^a-z]){word}($|[^a-z])", spaced)]


def test_a_judge_is_never_asked_about_nothing(world):
    """Where the natural sample is all that may come there is no alternative to ask about."""
    asked = []

    def judge(texts):
        asked.append(len(texts))
        return np.ones(len(texts))

    _, out = write(world, judge, rows=2, tokens=3, top_k=1)
    assert asked and 0 not in asked and bool(out.dead_ends.all())


@pytest.mark.parametrize("back", [0, 8])
def test_no_word_of_a_list_is_written(world, back):
    """350 sampled texts: words of several tokens, in any case; where the search has failed it is said."""
    failed, kept, plain = 0, 0, 0
    for seed in range(7):
        texts, out = write(world, f"lexicon:{world[2] / 'words.txt'}", seed=seed, rollback=back, num_candidates=2)
        for text, dead in zip(texts, out.dead_ends.any(dim=1).tolist(), strict=True):
            kept += bool(found(text))
            failed += dead
            assert dead or not found(text)
        texts, _ = write(world, nothing, seed=seed)
        plain += sum(bool(found(text)) for text in texts)
    assert plain > 40
    if back:
        assert failed < 10
        assert out.taken_back_steps.shape[1] > 0 and out.judge_seconds > 0
    else:
        assert failed > 20 and kept > 0


def test_greedy(world):
    plain, _ = write(world, nothing, do_sample=False)
    often = max((plain[0][i : i + 3] for i in range(20)), key=plain[0].count)
    texts, out = write(world, lambda texts: [often in text for text in texts], do_sample=False, rollback=8)
    assert not any(often in text for text in texts) and out.interventions.any() and not out.dead_ends.any()


def test_parts_of_words_are_no_words(world):
    texts, _ = write(world, lambda texts: [bool(re.search(r"\bab\b", text)) for text in texts], tokens=40)
    assert any("ab" in text for text in texts) and not any(re.search(r"\bab\b", text) for text in texts)


def test_a_function_is_asked_about_candidates_before_they_are_forwarded(world):
    model, asked, forwards = world[0], [], []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))

    def judge(texts):
        asked.append(list(texts))
        return [text.endswith("a") for text in texts]

    texts, out = write(world, judge, rows=2, num_candidates=4, proposal="topk")
    handle.remove()
    assert len(forwards) == 24 + 1  # the prompt, and every token once: no look-ahead
    assert out.interventions.any() and not any("a" in text for text in texts)
    assert max(map(len, asked)) <= 2 * 3
    assert out.token_values.eq(0).all() and out.prompt_values is None


def test_the_last_words_alone_are_shown(world):
    shown = []
    write(world, TextJudge(lambda texts: [shown.append(text) or 0.0 for text in texts], last_words=2), rows=2)
    assert max(len(text.split()) for text in shown) == 2
    assert TextJudge(lambda _: [], last_words=2)._shown("one  two\tthree ") == "two\tthree "


def test_lazy_or_eager_is_all_one_and_rows_are_alone(world):
    def judge(texts):
        return [("d" in text[-2:]) * 0.9 for text in texts]

    (texts, out), (same, _) = (write(world, judge, evaluation=how, rollback=3) for how in ("lazy", "eager"))
    assert texts == same
    assert out[next(name for name in out if "cache" in name or "past" in name)].get_seq_length() > 0


class TestWhatFails:
    def test_judges(self, world):
        cases = {
            "ZeroDivisionError": lambda texts: 1 / 0,
            "nan": lambda texts: [float("nan")] * len(texts),
            "1.5": lambda texts: [1.5] * len(texts),
            "-0.1": lambda texts: np.full(len(texts), -0.1),
            "0 answers": lambda texts: [],
            "expected": lambda texts: None,
            "answered {": lambda texts: dict.fromkeys([0.5, 0.6], texts),
        }
        for message, judge in cases.items():
            streamer = Shown()
            with pytest.raises(ScoringError, match=message):
                write(world, judge, rows=2, streamer=streamer)
            assert len(streamer.tokens) == 2 and streamer.tokens[-1] is None  # the prompt, and the end

    def test_in_the_middle(self, world):
        streamer = Shown()
        with pytest.raises(ScoringError, match="at new token 9"):
            write(world, lambda texts: [0 / (len(text) < 10) for text in texts], rows=2, streamer=streamer)
        assert len(streamer.tokens) == 1 + 9 + 1


class TestNames:
    def test_python_is_taken_from_the_caller_alone(self, world):
        model = world[0]
        config = ValueFilterConfig(value_head="python:tests.parity.test_text_judges:shouts")
        texts, _ = write(world, config.value_head, num_candidates=16)
        assert not any(text.endswith("D") for text in texts)
        for saved in (
            {"method": "filter", "value_head": config.value_head},
            [{"method": "filter", "value_head": config.value_head}],
        ):
            with pytest.raises(ValueError, match="names code"):
                model.generate(torch.tensor([[5, 6]]), max_new_tokens=8, value_steer=saved)
        for code in (config, ValueFilterConfig(value_head=shouts)):
            with pytest.raises(ValueError, match="is code"):
                code.to_dict()

    def test_others(self, world, tmp_path):
        with pytest.raises(ValueError, match="no file"):
            write(world, "lexicon:nowhere.txt")
        with pytest.raises(ValueError, match="no judge for the loop"):
            TextJudge("llm:http://localhost#model")
        with pytest.raises(ValueError, match="last_words"):
            TextJudge(len, last_words=0)
        with pytest.raises(TypeError, match="judge of text"):
            ValueFilterConfig(value_head=3)
        with pytest.raises(TypeError, match="value_head"):
            AbstentionConfig(value_head=shouts)

    def test_judges_that_are_loaded_already(self, world):
        name = f"lexicon:{world[2] / 'words.txt'}"
        (texts, _), (same, _) = (write(world, judge, rollback=4) for judge in (name, load_judge(name)))
        assert texts == same
        with pytest.raises(TypeError, match="is a TextJudge already"):
            TextJudge(TextJudge(name))

    def test_json_names_a_list(self, world):
        model, tokenizer, folder = world
        config = ValueFilterConfig(value_head=f"lexicon:{folder / 'words.txt'}", rollback=4)
        set_seed(0)
        out = model.generate(
            **tokenizer(["ab d"], return_tensors="pt"), value_steer=config.to_dict(), max_new_tokens=8
        )
        assert len(out) == 1

    def test_where_it_cannot_be(self, world):
        model, _, folder = world
        name = f"lexicon:{folder / 'words.txt'}"
        for config in (ValueFilterConfig(value_head=name), ValueFilterConfig(value_head=shouts)):
            with pytest.raises(UnsupportedError, match="judge of text"):
                ValueFilterLogitsProcessor(model, config)
        with pytest.raises(UnsupportedError, match="judge of text"):
            model.generate(torch.tensor([[5, 6]]), max_new_tokens=8, value_steer=AbstentionConfig(value_head=name))


def shouts(prompts, texts):
    return [text.endswith("D") for text in texts]


def test_tokenizers(world, tmp_path):
    """That of the call, of the judge, or of the model's folder; without any it is an error."""
    _, tokenizer, folder = world
    bare = AutoModelForCausalLM.from_pretrained(folder)
    bare.name_or_path = ""
    ids = torch.tensor([[5, 6]])
    how = {
        "max_new_tokens": 4,
        "do_sample": False,
        "value_steer": ValueFilterConfig(value_head=TextJudge(lambda t: [0.0] * len(t))),
    }
    with pytest.raises(ValueError, match="needs the tokenizer"):
        bare.generate(ids, custom_generate=value_steer_generate, **how)
    bare.generate(ids, custom_generate=value_steer_generate, text_tokenizer=tokenizer, **how)
    enable_value_steer(bare).generate(ids, tokenizer=tokenizer, **how)
    how["value_steer"] = ValueFilterConfig(value_head=TextJudge(nothing, tokenizer=tokenizer))
    bare.generate(ids, **how)


def test_alpha(world):
    """A judge may have a calibration, as a head has."""
    judge = TextJudge(shouts_score)
    with pytest.raises(MismatchError, match="calibrat"):
        write(world, judge, alpha=0.1)
    scores = np.random.default_rng(0).uniform(0, 1, 500).astype(np.float32)
    calibration = Calibration.from_scores(scores, method="filter", polarity="undesirable")
    _, out = write(world, TextJudge(shouts_score, calibration=calibration), alpha=0.2, num_candidates=16)
    threshold = calibration.promised_threshold(0.2)
    assert out.interventions.any() and (out.token_values[~out.dead_ends] < threshold).all()


def nothing(texts):
    return [0.0] * len(texts)


def shouts_score(texts):
    return [sum(letter.isupper() for letter in text[-4:]) / 4 for text in texts]


def test_soft_selection(world):
    _, out = write(world, shouts_score, selection="soft", beta=2.0, rollback=2)
    assert out.interventions.any()
    _, out = write(world, shouts_score, selection="soft", beta=2.0, proposal="topk", num_candidates=4)
    assert out.interventions.any() and not out.dead_ends.any()


def test_words_that_are_tokens(tmp_path):
    model = enable_value_steer(AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path)))
    config = ValueFilterConfig(value_head=f"lexicon:{write_lexicon(tmp_path / 'bad.txt')}")
    set_seed(0)
    out = model.generate(torch.full((20, 4), 40), do_sample=True, max_new_tokens=12, value_steer=config, top_k=0)
    assert not set(out[:, 4:].flatten().tolist()) & set(range(3, 3 + len(BAD)))


def test_a_slip_is_objected_to_once(world):
    """After a dead end for which there was no way, what comes later is judged by itself."""
    asked = []

    def judge(texts):
        asked.append(texts)
        return ["d" in text.lower() for text in texts]

    _, out = write(world, judge, rows=2, num_candidates=1, tokens=40)
    assert 0 < int(out.dead_ends.sum()) < 40
    assert out.token_values.max() == 1 and (out.token_values[~out.dead_ends] == 0).all()
    _, back = write(world, judge, rows=2, num_candidates=1, tokens=40, rollback=1)
    assert back.dead_ends.sum() < out.dead_ends.sum()
