"""Labels of a collection by a judge behind a server that is busy, broken and strange."""

import time
from collections import defaultdict

import pytest
from transformers import AutoTokenizer

from hf_value_steer.arguments.collect import CollectArguments, LabelArguments
from hf_value_steer.judges import server as client
from hf_value_steer.training.collect import collect
from hf_value_steer.training.label import Labels, label, labels_folder
from tests.chat_server import Reply, chat_server, completion
from tests.tiny_text import write_world


SHARDS, PROMPTS = 4, 5  # and of each shard


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"), SHARDS * PROMPTS)


@pytest.fixture
def collection(world, tmp_path):
    return collect(
        CollectArguments(
            output=str(tmp_path), model=str(world / "model"), prompts=str(world / "prompts.txt"), samples=1,
            max_new_tokens=6, batch_size=PROMPTS,
        )
    )  # fmt: skip


FIRST = [  # of the prompts of a shard; what all but the last are answered in the end is "safe"
    Reply(429, headers={"Retry-After": "1"}),
    Reply(500),
    Reply(body=completion("unsafe"), cut="length"),
    Reply(body=b"<html>"),
    "I would rather not say.",
]


def test_failures_are_tried_again_counted_and_resumed(world, collection, monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE", 1e-3)
    tokenizer, prompts = AutoTokenizer.from_pretrained(world / "model"), [each.text for each in collection.prompts]
    times, broken = defaultdict(list), True

    def answer(question):
        index = prompts.index(question.partition("<prompt>\n")[2].partition("\n</prompt>")[0])
        times[index].append(time.monotonic())
        if broken and index == 2 * PROMPTS + 2:
            return Reply(500, b"out of memory")
        return FIRST[index % PROMPTS] if len(times[index]) == 1 else "safe"

    with chat_server() as server:
        server.answer = answer
        arguments = LabelArguments(judges=[f"llm:{server.address}#model"])
        with pytest.raises(RuntimeError, match="status 500 .*out of memory .what is labelled stays: run it again"):
            label(collection, tokenizer, arguments)
        folder = labels_folder(collection, *arguments.judges)
        labelled = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
        assert sorted(path.name for path in labelled) == ["00000.safetensors", "00001.safetensors"]
        assert {index: len(times[index]) for index in range(2 * PROMPTS)} == tries(range(2 * PROMPTS))
        assert max(times) < 3 * PROMPTS

        times.clear()
        broken = False
        report = label(collection, tokenizer, arguments)["judges"][arguments.judges[0]]
    assert {index: len(each) for index, each in sorted(times.items())} == tries(range(2 * PROMPTS, SHARDS * PROMPTS))
    assert all(times[index][1] - times[index][0] >= 1 for index in times if index % PROMPTS == 0)
    assert all(path.read_bytes() == content for path, content in labelled.items())
    assert report == {
        "mean": pytest.approx(1 / PROMPTS),
        "unparseable": SHARDS,
        "truncated": 0,
    }  # what cannot be read is unsafe
    assert Labels(collection, *arguments.judges).responses().tolist() == [0, 0, 0, 0, 1] * SHARDS


def tries(indices):
    """How often each prompt is asked for: twice, but for nonsense, which is an answer."""
    return {index: 1 if index % PROMPTS == PROMPTS - 1 else 2 for index in indices}
