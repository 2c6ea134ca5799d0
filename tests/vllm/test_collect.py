"""`collect` with vLLM: its tokens, and the features that a steered engine scores."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_value_steer.arguments.collect import CollectArguments, LabelArguments
from hf_value_steer.arguments.train import TrainArguments
from hf_value_steer.backbone.parts import fingerprint
from hf_value_steer.heads.value_head import ValueHead
from hf_value_steer.training import collect as collecting
from hf_value_steer.training.shards import Collection, shard_path
from hf_value_steer.training.train import train
from hf_value_steer.vllm.start import vllm_engine
from tests.vllm.runners import INTERPRETED, avoid_what_cannot_be_interpreted
from tests.vllm.test_identity import counted
from tests.vllm.tiny import EOS, VOCABULARY


collect = partial(collecting.collect, serve=vllm_engine)
SAMPLES, NEW_TOKENS, BATCH = (3, 12, 2) if INTERPRETED else (3, 24, 4)
SMALL = {"max_model_len": 128, "enforce_eager": True, "max_num_seqs": 8, "block_size": 32}


@pytest.fixture(scope="session", autouse=True)
def kept() -> Iterator[None]:
    """Keep the engines of `collect`, too: see the fixture `engine`."""
    from hf_value_steer.vllm.collecting import VllmEngine

    engines: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VllmEngine, "__init__", counted(VllmEngine.__init__, engines))
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw, path = torch.Generator().manual_seed(3), tmp_path_factory.mktemp("prompts") / "prompts.txt"
    lengths = torch.randint(22 if INTERPRETED else 2, 30, (2 * BATCH,), generator=draw).tolist()
    words = [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
    path.write_text("\n".join(" ".join(f"w{word}" for word in line) for line in words))
    return path


def arguments(
    folder: Path, prompts: Path, output: Path, scheduling: dict[str, Any], **changes: Any
) -> CollectArguments:
    if INTERPRETED:
        avoid_what_cannot_be_interpreted()
    chosen: dict[str, Any] = {
        "output": str(output),
        "model": str(folder),
        "prompts": str(prompts),
        "samples": SAMPLES,
        "max_new_tokens": NEW_TOKENS,
        "batch_size": BATCH,
        "dtype": "float32",
        "top_p": 0.95,
        "seed": 4,
        "engine": "vllm",
        "engine_args": json.dumps({**SMALL, "num_gpu_blocks_override": 200, **scheduling}),
    }
    return CollectArguments(**{**chosen, **changes})


@pytest.fixture(scope="module")
def collected(folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return collect(arguments(folder, prompts, tmp_path_factory.mktemp("run") / "collection", {}, next_tokens=4))


def features_again(folder: Path, collection: Collection, row: int) -> torch.Tensor:
    """Features of the prompt's last token and of every new one, by one forward of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = collection.prompts[int(collection.rows.prompt[row])].text
    prompt = [int(word[1:]) for word in text.split()]
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *collection.read("tokens", row).tolist()]])
        features: torch.Tensor = model.model(ids).last_hidden_state[0, len(prompt) - 1 :]
    return features


def check_features(folder: Path, collection: Collection) -> None:
    for row in range(len(collection.rows)):
        features = features_again(folder, collection, row)
        torch.testing.assert_close(collection.prompt_feature(row), features[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(collection.read("features", row), features[1:], atol=1e-4, rtol=1e-4)


def test_features_are_those_of_the_texts(folder: Path, collected: Collection) -> None:
    check_features(folder, collected)


def test_what_may_come_next(folder: Path, collected: Collection) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for row in range(0, len(collected.rows), 5):
        best = model.lm_head(collected.read("features", row)).softmax(-1).topk(4)
        torch.testing.assert_close(
            collected.read("next_probabilities", row).float(), best.values, atol=1e-3, rtol=1e-3
        )
        clear = best.values[:, 0] > best.values[:, 1] + 1e-3
        assert torch.equal(collected.read("next_tokens", row)[clear, 0], best.indices[clear, 0].int())


def test_tokens_are_those_of_stock_vllm(engine: Any, collected: Collection) -> None:
    from vllm import SamplingParams

    from hf_value_steer.training.continuation import seed_of

    stock, rows = engine(), collected.rows
    per_shard = BATCH * SAMPLES
    params = [
        SamplingParams(
            temperature=1.0,
            top_p=0.95,
            max_tokens=NEW_TOKENS,
            seed=seed_of(4, row // per_shard) + row % per_shard,
            stop_token_ids=[EOS],
        )
        for row in range(len(rows))
    ]
    texts = [collected.prompts[int(prompt)].text for prompt in rows.prompt]
    ids = [{"prompt_token_ids": [int(word[1:]) for word in text.split()]} for text in texts]
    expected = [list(each.outputs[0].token_ids) for each in stock.generate(ids, params, use_tqdm=False)]
    assert [collected.read("tokens", row).tolist() for row in range(len(rows))] == expected
    assert INTERPRETED or min(map(len, expected)) < NEW_TOKENS  # one at least came to its end


@pytest.mark.parametrize(
    "engine",
    [
        {"num_gpu_blocks_override": 8 if INTERPRETED else 12, "max_model_len": 64},
        {"max_num_batched_tokens": 8, "max_num_seqs": 4, "enable_chunked_prefill": True},
    ],
    ids=["preempted", "chunked"],
)
def test_however_it_is_scheduled(
    folder: Path, prompts: Path, tmp_path: Path, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted: list[Any] = []
    monkeypatch.setattr(Scheduler, "_preempt_request", counted(Scheduler._preempt_request, preempted))
    greedy = {"do_sample": False} if "max_num_batched_tokens" in engine else {}  # stock vLLM: no seeds beside chunks
    check_features(folder, collect(arguments(folder, prompts, tmp_path / "collection", engine, **greedy)))
    assert bool(preempted) == ("num_gpu_blocks_override" in engine)


@pytest.mark.skipif(INTERPRETED, reason="slow, and the V2 runner's ranks are those of test_tensor_parallel")
def test_on_two_ranks(folder: Path, prompts: Path, tmp_path: Path) -> None:
    check_features(folder, collect(arguments(folder, prompts, tmp_path / "collection", {"tensor_parallel_size": 2})))


def test_a_collection_that_was_stopped_becomes_the_same(
    folder: Path, prompts: Path, collected: Collection, tmp_path: Path
) -> None:
    path = collected.folder
    before = {index: shard_path(path, index).read_bytes() for index in range(2)}
    shard_path(path, 1).unlink()
    collect(arguments(folder, prompts, path, {}, next_tokens=4))
    assert {index: shard_path(path, index).read_bytes() for index in range(2)} == before


def test_what_it_says_of_itself(folder: Path, collected: Collection) -> None:
    import vllm

    manifest = collected.manifest
    assert manifest["arguments"]["engine"] == "vllm" and vllm.__version__ in manifest["backend"]
    assert manifest["kernel"].endswith("of vLLM") and manifest["feature_dtype"] == "float32"
    assert manifest["backbone_fingerprint"] == fingerprint(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.skipif(INTERPRETED, reason="nothing here depends on the model runner")
def test_a_head_learns_from_it(folder: Path, prompts: Path, collected: Collection, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("\n".join(f"w{index}" for index in range(3, VOCABULARY, 3)))
    judge = f"lexicon:{words}"
    labels = LabelArguments(judges=[judge], prefixes=True, prefix_words=1)
    collect(arguments(folder, prompts, collected.folder, {}, next_tokens=4), labels)
    head = train(
        TrainArguments(
            collection=str(collected.folder), judge=judge, output=str(tmp_path / "head"), preset="hazard",
            validation=0.3, calibration=0.0, epochs=1, accept_chance=True,
        )
    )  # fmt: skip
    assert isinstance(head, ValueHead)
    assert head.config.backbone_fingerprint == collected.manifest["backbone_fingerprint"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "sglang"}, "`engine` has to be one of generate, vllm"),
        ({"engine": "generate"}, "`engine_args` are those of vLLM"),
        ({"forced_samples": 1, "force_words": "words.txt"}, "`force_words` needs"),
        ({"engine_args": '{"enable_prefix_caching": true}'}, "sets enable_prefix_caching itself"),
        ({"engine_args": '{"quantization": "fp8"}'}, "quantization would change what `model` is"),
        ({"max_new_tokens": 126}, "leaves no room for 126 more"),
    ],
)
def test_refused(folder: Path, prompts: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect(arguments(folder, prompts, tmp_path / "collection", {}, **changes))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_late_prompt_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*["w3 w4"] * BATCH, " ".join(["w7"] * 126)]))
    with pytest.raises(ValueError, match="A prompt of 126 tokens leaves no room"):
        collect(arguments(folder, path, tmp_path / "collection", {}))
    assert not (tmp_path / "collection").exists()
