"""`alpha` in place of a threshold: the same text as with the threshold that it stands for, or a clear refusal."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModel, set_seed

from hf_value_steer import (
    AbstentionConfig,
    AbstentionLogitsProcessor,
    ValueFilterConfig,
    ValueFilterLogitsProcessor,
    ValueHead,
    ValueSteerForCausalLM,
    value_steer_generate,
)
from hf_value_steer.backbone.parts import fingerprint
from hf_value_steer.calibration import Calibration
from hf_value_steer.configuration.parse import parse_value_steer
from tests.families import build, prompts, random_head
from tests.steer import steer


ROWS, ALPHA = 4, 0.35


def calibrated_head(model, polarity="undesirable", **options):
    """A head and a made-up calibration of it, whose thresholds are not far from what the head's values are."""
    head, rng = random_head(model, polarity), np.random.default_rng(0)
    scores = rng.random(200).astype(np.float32)
    if options.get("mode") == "martingale":
        options["prompt_values"] = (scores + rng.uniform(-0.2, 0.2, 200)).clip(0.01, 0.99)
    if options.get("mode") == "selective":
        options["correct"] = rng.random(200) < scores
    head.calibration = Calibration.from_scores(
        scores, polarity=polarity, head_fingerprint=fingerprint(head), **options
    )
    return head


def generate(model, value_steer, rows=slice(None), **extra):
    inputs = {name: tensor[rows] for name, tensor in prompts(ROWS).items()}
    return steer(model, value_steer, **{**inputs, "max_new_tokens": 16, "eos_token_id": None, **extra})


@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
@pytest.mark.parametrize("mode", ["marginal", "pac", "uniform"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_filter_takes_the_threshold_of_the_calibration(llama, mode, polarity, do_sample):
    head = calibrated_head(llama, polarity, mode=mode)
    threshold = head.calibration.threshold(ALPHA)
    by_alpha = generate(llama, ValueFilterConfig(value_head=head, alpha=ALPHA), do_sample=do_sample)
    expected = generate(llama, ValueFilterConfig(value_head=head, threshold=threshold), do_sample=do_sample)
    assert torch.equal(by_alpha.sequences, expected.sequences)
    assert torch.equal(by_alpha.interventions, expected.interventions) and by_alpha.interventions.any()
    own = generate(llama, ValueFilterConfig(value_head=head), do_sample=do_sample)
    assert head.config.threshold == 0.5 != threshold and not torch.equal(own.sequences, expected.sequences)


@pytest.mark.parametrize("options", [{}, {"mode": "pac"}, {"mode": "selective"}])
def test_abstention_takes_the_threshold_of_the_calibration(llama, options):
    head = calibrated_head(llama, "desirable", method="abstain", **options)
    threshold = head.calibration.threshold(ALPHA)
    by_alpha = AbstentionConfig(value_head=head, alpha=ALPHA)
    expected = AbstentionConfig(value_head=head, threshold=threshold)
    outputs = [generate(llama, config, eos_token_id=2) for config in (by_alpha, expected)]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert outputs[0].abstained.any() and torch.equal(outputs[0].abstention_step, outputs[1].abstention_step)
    processed = [
        llama.generate(**prompts(ROWS), max_new_tokens=16, logits_processor=[AbstentionLogitsProcessor(llama, config)])
        for config in (by_alpha, expected)
    ]
    assert torch.equal(*processed)


@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
@pytest.mark.parametrize("mode", ["marginal", "martingale"])
def test_the_filter_fires_on_the_texts_that_the_calibration_says(llama, mode, polarity):
    """Calibrated on 40 texts and asked to write them again: rank ceil(41 * 0.65) = 27, so 13 rows are steered."""
    call = {**prompts(40), "max_new_tokens": 16, "do_sample": True, "return_dict_in_generate": True}
    call |= {"eos_token_id": None, "custom_generate": value_steer_generate}
    head = random_head(llama, polarity)
    set_seed(0)
    base = llama.generate(**call, value_steer=ValueFilterConfig(value_head=head, num_candidates=1))
    scores = base.token_values.amax(1) if polarity == "undesirable" else base.token_values.amin(1)
    prompt_values = base.prompt_values if mode == "martingale" else None
    head.calibration = Calibration.from_scores(scores, mode=mode, polarity=polarity, prompt_values=prompt_values)
    set_seed(0)
    steered = llama.generate(**call, value_steer=ValueFilterConfig(value_head=head, alpha=ALPHA, num_candidates=20))
    fired = (steered.candidates_evaluated > 1).any(1)
    size = scores.logit() - base.prompt_values.logit() if mode == "martingale" else scores
    expected = size.argsort(descending=polarity == "undesirable")[:13]
    assert sorted(expected.tolist()) == fired.nonzero().flatten().tolist()
    assert torch.equal(steered.sequences[~fired], base.sequences[~fired])
    assert not (steered.sequences[fired] == base.sequences[fired]).all(1).any()


def test_selective_abstention_answers_the_texts_that_the_calibration_says(llama):
    """The score of a text: its prompt's value and those of its tokens but the last, which nothing comes after."""
    head = random_head(llama, "desirable")
    base = generate(llama, AbstentionConfig(value_head=head, threshold=1e-6), eos_token_id=2)
    values = torch.cat([base.prompt_values[:, None], base.token_values], dim=1)
    checked = [row[~row.isnan()][:-1] for row in values]
    scores = torch.stack([row.min() for row in checked])
    for threshold in scores.tolist():
        out = generate(llama, AbstentionConfig(value_head=head, threshold=threshold), eos_token_id=2)
        assert out.abstained.tolist() == (scores <= threshold).tolist()


def thresholds_by_hand(model, head, alpha):
    """Row by row, without cache, batch or padding: `sigmoid(log c + logit(p_0))`, odds turned for `"desirable"`."""
    c, thresholds, inputs = math.exp(head.calibration.threshold(alpha)), [], prompts(ROWS)
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        prompt_value = head(model.base_model(ids[None, mask.bool()]).last_hidden_state[0, -1]).value.item()
        factor = c if head.config.polarity == "undesirable" else 1 / c
        odds = factor * prompt_value / (1 - prompt_value)
        thresholds.append(odds / (1 + odds))
    return thresholds


@pytest.mark.parametrize("evaluation", ["lazy", "eager"])
@pytest.mark.parametrize("polarity", ["undesirable", "desirable"])
def test_martingale_thresholds_follow_the_prompt_of_each_row(llama, polarity, evaluation):
    head = calibrated_head(llama, polarity, mode="martingale")
    config = ValueFilterConfig(value_head=head, alpha=ALPHA, evaluation=evaluation)
    together, thresholds = generate(llama, config), thresholds_by_hand(llama, head, ALPHA)
    assert together.interventions.any() and max(thresholds) - min(thresholds) > 0.1
    for row, threshold in enumerate(thresholds):
        alone = generate(llama, replace(config, alpha=None, threshold=threshold), slice(row, row + 1))
        assert torch.equal(together.sequences[row], alone.sequences[0])
        assert torch.equal(together.interventions[row], alone.interventions[0])
    sampled = generate(llama, config, do_sample=True)
    expected = generate(llama, replace(config, alpha=None, threshold=thresholds), do_sample=True)
    assert torch.equal(sampled.sequences, expected.sequences)


def test_martingale_thresholds_in_the_processor(llama):
    head = calibrated_head(llama, mode="martingale")
    config = ValueFilterConfig(value_head=head, alpha=ALPHA, proposal="topk", num_candidates=5)
    steered = generate(llama, config)
    processor = ValueFilterLogitsProcessor(llama, config)
    assert steered.interventions.any()
    for _ in range(2):  # every generation has prompts of its own
        plain = {"max_new_tokens": 16, "eos_token_id": None, "logits_processor": [processor]}
        assert torch.equal(llama.generate(**prompts(ROWS), **plain), steered.sequences)
        llama.generate(**prompts(2, length=7), **plain)


def test_martingale_thresholds_in_beam_search(llama):
    head = calibrated_head(llama, mode="martingale")
    config = ValueFilterConfig(value_head=head, alpha=ALPHA, proposal="topk", num_candidates=8)
    arguments = {**prompts(ROWS), "max_new_tokens": 6, "num_beams": 3, "eos_token_id": None}
    by_alpha = llama.generate(**arguments, logits_processor=[ValueFilterLogitsProcessor(llama, config)])
    a_beam = tuple(threshold for threshold in thresholds_by_hand(llama, head, ALPHA) for _ in range(3))
    by_hand = replace(config, alpha=None, threshold=a_beam)
    expected = llama.generate(**arguments, logits_processor=[ValueFilterLogitsProcessor(llama, by_hand)])
    assert torch.equal(by_alpha, expected) and not torch.equal(by_alpha, llama.generate(**arguments))


def test_a_prompt_without_a_finite_value_stops_the_generation(llama):
    head = calibrated_head(llama, mode="martingale")
    config = ValueFilterConfig(value_head=head, alpha=ALPHA)
    processor = ValueFilterLogitsProcessor(llama, config)
    for parameter in head.parameters():
        parameter.data.fill_(1e38)
    with pytest.raises(RuntimeError, match="not finite at new token 0"):
        generate(llama, replace(config, value_head=head, alpha=None, threshold=0.3))
    with pytest.raises(RuntimeError, match="not finite at new token 0"):
        head.calibration = replace(head.calibration, head_fingerprint=None)
        llama.generate(**prompts(1), max_new_tokens=2, logits_processor=[processor])


def refused(model, head, message, cls=ValueFilterConfig, **options):
    config = cls(value_head=head, alpha=options.pop("alpha", ALPHA), **options)
    with pytest.raises(ValueError, match=message):
        generate(model, config, eos_token_id=2)
    processor = {ValueFilterConfig: ValueFilterLogitsProcessor, AbstentionConfig: AbstentionLogitsProcessor}[cls]
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts(1), max_new_tokens=2, logits_processor=[processor(model, config)])


def test_what_keeps_no_promise_is_refused(llama):
    refused(llama, random_head(llama), "`alpha`=0.35 needs a calibrated head, and this one has no calibration.json")
    head = calibrated_head(llama)
    refused(llama, head, 'needs a calibration of that method, but .* calibrated for "filter"', AbstentionConfig)
    message = r"`alpha`=0.004 has no finite threshold: .*\(mode 'marginal', n=200\) can promise at least 0.005\."
    refused(llama, head, message, alpha=0.004)
    refused(llama, calibrated_head(llama, mode="pac"), "n=200\\) can promise at least 0.0149", alpha=0.01)
    certain = calibrated_head(llama)
    certain.calibration = Calibration.from_scores([1.0] * 50)
    refused(llama, certain, "n=50\\) can promise none at all", alpha=0.9)
    for_abstention = calibrated_head(llama, "desirable", method="abstain")
    refused(llama, for_abstention, 'with the method "filter" needs .* calibrated for "abstain"')
    selective = calibrated_head(llama, "desirable", method="abstain", mode="selective")
    for option in ({"patience": 2}, {"min_new_tokens": 1}):
        refused(llama, selective, "at their first unacceptable value: leave out", AbstentionConfig, **option)


def test_a_calibration_of_another_head_is_refused(llama):
    head = calibrated_head(llama)
    head.config.polarity = "desirable"
    refused(llama, head, "is about another head \\(polarity 'undesirable'")
    head = calibrated_head(llama)
    with torch.no_grad():
        head.net[0].weight.mul_(1.5)
    refused(llama, head, f"is about another head .* fingerprint {head.calibration.head_fingerprint}")


def test_alpha_and_threshold_exclude_each_other():
    with pytest.raises(ValueError, match="`threshold` and `alpha` both say where to act"):
        ValueFilterConfig(threshold=0.3, alpha=0.1)
    for alpha in (0, 1.0, -0.5, "0.1", True, float("nan")):
        for cls in (ValueFilterConfig, AbstentionConfig):
            with pytest.raises(ValueError, match=r"`alpha` has to be a number in \(0, 1\)"):
                cls(alpha=alpha)
    config = ValueFilterConfig(value_head="org/head", alpha=0.05)
    assert config.to_dict() == {"method": "filter", "value_head": "org/head", "alpha": 0.05}
    assert parse_value_steer(json.loads(config.to_json_string())) == {"filter": config}


def test_the_calibration_is_saved_and_loaded_with_the_head(llama, tmp_path):
    head = calibrated_head(llama)
    head.save_pretrained(tmp_path / "head")
    names = sorted(path.name for path in (tmp_path / "head").iterdir())
    assert names == ["README.md", "calibration.json", "config.json", "model.safetensors"]
    for cls in (ValueHead, AutoModel):
        assert cls.from_pretrained(tmp_path / "head").calibration == head.calibration
    expected = generate(llama, ValueFilterConfig(value_head=head, alpha=ALPHA)).sequences
    by_name = {"method": "filter", "value_head": str(tmp_path / "head"), "alpha": ALPHA}
    assert torch.equal(generate(llama, by_name).sequences, expected)
    whole = ValueSteerForCausalLM(build("llama"), head, {"method": "filter", "alpha": ALPHA})
    whole.save_pretrained(tmp_path / "whole", save_backbone=True)
    again = ValueSteerForCausalLM.from_pretrained(tmp_path / "whole")
    assert again.value_head.calibration == head.calibration
    plain = {"max_new_tokens": 16, "eos_token_id": None}
    assert torch.equal(again.generate(**prompts(ROWS), **plain), expected)


def test_a_head_without_calibration_has_none(llama, tmp_path):
    random_head(llama).save_pretrained(tmp_path)
    assert ValueHead.from_pretrained(tmp_path).calibration is None
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(ValueError, match="calibration.json is no calibration"):
        ValueHead.from_pretrained(tmp_path)


def test_the_calibration_comes_from_the_same_place_on_the_hub(llama, tmp_path):
    """A Hub cache, laid out by hand: two revisions of a repository with the head in a subfolder."""
    heads = {"1" * 40: calibrated_head(llama), "2" * 40: calibrated_head(llama, mode="pac"), "3" * 40: None}
    cached = tmp_path / "models--org--heads"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1" * 40)
    for revision, head in heads.items():
        (head or random_head(llama)).save_pretrained(cached / "snapshots" / revision / "sub")
    for revision, head in heads.items():
        place = {"cache_dir": tmp_path, "subfolder": "sub", "local_files_only": True}
        place |= {} if revision.startswith("1") else {"revision": revision}
        loaded = ValueHead.from_pretrained("org/heads", **place)
        assert loaded.calibration == (head and head.calibration)
