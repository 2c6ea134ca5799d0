"""Judges that are models: what they answer is what the model says of each text alone."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hf_value_steer.judges import load_judge
from hf_value_steer.judges.prompt import Prompt
from tests.unit.test_judges import prompts


WORDS = "one two three four five six red green blue user assistant".split()
VOCABULARY = {word: index for index, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
TEXTS = ["one two three four five six", "red", "green blue one", "two two two two", ""]


def tokenizer(folder, special, **options):
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **options)
    fast.save_pretrained(folder)
    return fast


def random(model, folder):
    """Save the model with weights large enough that its answers differ."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(index))
    model.save_pretrained(folder)
    return model.eval()


SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


def bert(folder, **config):
    words = tokenizer(folder, True, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    return random(BertForSequenceClassification(BertConfig(**SIZES, **config)), folder), words


def llama(folder, chat_template):
    tokenizer(folder, True, eos_token="[SEP]", chat_template=chat_template)
    return random(LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0, num_labels=1)), folder)


@torch.inference_mode()
def logits(model, words, *texts, **options):
    """What the model says of one text, or pair, alone."""
    return model(**words(*texts, return_tensors="pt", **options)).logits[0]


CHAT = "{% for m in messages %}[CLS] {{ m.role }} {{ m.content }} [SEP] {% endfor %}"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_labels_are_a_softmax_and_the_second_is_the_default(tmp_path, device):
    model, words = bert(tmp_path, id2label={0: "fine", 1: "rude"}, label2id={"fine": 0, "rude": 1})
    expected = [logits(model, words, text).softmax(0)[1].item() for text in TEXTS]
    judge = load_judge(f"classifier:{tmp_path}", batch_size=2, device=device)
    rude = judge(prompts(5), TEXTS)
    assert rude == pytest.approx(expected, abs=1e-4) and np.ptp(rude) > 0.01
    fine = load_judge(f"classifier:{tmp_path}#fine", batch_size=3, device=device)
    assert fine(prompts(5), TEXTS) == pytest.approx(1 - rude, abs=1e-4)


def test_several_labels_are_a_sigmoid_each_where_the_config_says_so(tmp_path):
    labels = {index: name for index, name in enumerate("abc")}
    model, words = bert(tmp_path, id2label=labels, problem_type="multi_label_classification")
    expected = [logits(model, words, text).sigmoid()[2].item() for text in TEXTS]
    assert load_judge(f"classifier:{tmp_path}#c")(prompts(5), TEXTS) == pytest.approx(expected, abs=1e-5)


def test_one_label_is_a_sigmoid(tmp_path):
    model, words = bert(tmp_path, num_labels=1)
    expected = [logits(model, words, text).sigmoid().item() for text in TEXTS]
    assert load_judge(f"classifier:{tmp_path}")(prompts(5), TEXTS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("label", ["", "#", "#d", "#LABEL_1"])
def test_a_label_that_is_not_clear_is_refused(tmp_path, label):
    bert(tmp_path, id2label={index: name for index, name in enumerate("abc")})
    with pytest.raises(ValueError, match="name one of the labels of .* a, b, c"):
        load_judge(f"classifier:{tmp_path}{label}")


def test_a_model_of_another_kind_is_refused(tmp_path):
    bert(tmp_path, num_labels=1, problem_type="regression")
    with pytest.raises(ValueError, match="use `reward:"):
        load_judge(f"classifier:{tmp_path}")
    bert(tmp_path, num_labels=2)
    with pytest.raises(ValueError, match="has 2 outputs, a reward model has one; use `classifier:"):
        load_judge(f"reward:{tmp_path}")


def test_a_model_without_a_trained_classifier_is_refused(tmp_path):
    model, _ = bert(tmp_path)
    BertModel(model.config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no sequence-classification model, it lacks .*classifier.weight"):
        load_judge(f"classifier:{tmp_path}")


@pytest.mark.parametrize("kind", ["classifier", "reward"])
def test_a_missing_model_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=f"Judge '{kind}:.*absent' cannot be loaded"):
        load_judge(f"{kind}:{tmp_path / 'absent'}")


def test_long_texts_are_cut_and_counted(tmp_path):
    model, words = bert(tmp_path)
    judge = load_judge(f"classifier:{tmp_path}")
    long = " ".join(["one", "red"] * 10)
    scores = judge(prompts(2), [long, "red"])
    assert judge.truncated == 1
    kept = " ".join(long.split()[:14])  # and [CLS] and [SEP]
    assert scores[0] == pytest.approx(logits(model, words, kept).softmax(0)[1].item(), abs=1e-5)


def test_a_reward_reads_prompt_and_response_in_the_chat_template(tmp_path):
    model = llama(tmp_path, CHAT)
    asked = [Prompt("one"), Prompt("two three"), Prompt("x", {}, [{"role": "user", "content": "four"}])]
    texts = [
        "[CLS] user one [SEP] [CLS] assistant red blue green [SEP]",
        "[CLS] user two three [SEP] [CLS] assistant red [SEP]",
        "[CLS] user four [SEP] [CLS] assistant five six five six [SEP]",
    ]
    ids = [[VOCABULARY[word] for word in text.split()] for text in texts]
    with torch.inference_mode():
        expected = [model(torch.tensor([row])).logits.sigmoid().item() for row in ids]
    judge = load_judge(f"reward:{tmp_path}", batch_size=3)  # its tokenizer has no padding token, the model has
    scores = judge(asked, ["red blue green", "red", "five six five six"])
    assert scores == pytest.approx(expected, abs=1e-5) and np.ptp(scores) > 0.01 and judge.truncated == 0


def test_a_long_chat_keeps_its_end(tmp_path):
    llama(tmp_path, CHAT)
    judge = load_judge(f"reward:{tmp_path}")
    long = " ".join(["one"] * 20)
    kept, same, other = judge([Prompt("red"), Prompt("blue"), Prompt("red")], [long, long, long + " two"])
    assert judge.truncated == 3 and kept == same != other


def test_a_reward_without_chat_template_reads_a_pair(tmp_path):
    model, words = bert(tmp_path, num_labels=1)
    responses = ["red", "two three four"]
    expected = [logits(model, words, "one question", response).sigmoid().item() for response in responses]
    assert load_judge(f"reward:{tmp_path}")(prompts(2), responses) == pytest.approx(expected, abs=1e-5)


def test_a_decoder_that_knows_no_padding_reads_row_by_row(tmp_path):
    config = GPT2Config(vocab_size=len(VOCABULARY), n_positions=16, n_embd=16, n_layer=1, n_head=2, num_labels=2)
    config.bos_token_id = config.eos_token_id = 2
    model = random(GPT2ForSequenceClassification(config), tmp_path)
    words = tokenizer(tmp_path, False, eos_token="[SEP]")
    expected = [logits(model, words, text).softmax(0)[1].item() for text in TEXTS[:4]]
    judge = load_judge(f"classifier:{tmp_path}", batch_size=4)
    assert judge(prompts(4), TEXTS[:4]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(RuntimeError, match="no token of an empty text"):
        judge(prompts(5), TEXTS)
