"""`hf-value-steer vectors`: from labelled generations or texts to vectors, a sweep and a baked checkpoint."""

import json

import pytest
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_value_steer import SteeringVectors
from hf_value_steer.activation import apply
from hf_value_steer.arguments.collect import CollectArguments, LabelArguments
from hf_value_steer.cli import main
from hf_value_steer.evaluation.sweep import collapsed, sweep_page, window
from hf_value_steer.training.collect import collect
from hf_value_steer.training.vectors import vectors_from_collection, vectors_from_pairs
from tests.families import build, random_head
from tests.golden_vectors import FOLDER
from tests.tiny_text import BAD, GOOD, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, prompts, a word list and a labelled collection; vectors of the latter."""
    folder = write_world(tmp_path_factory.mktemp("world"), 24)
    judge, prompts = f"lexicon:{folder / 'bad.txt'}", f"{folder}/prompts.txt"
    given = {"output": f"{folder}/collection", "model": f"{folder}/model", "prompts": prompts}
    collect(CollectArguments(**given, samples=4, max_new_tokens=8), LabelArguments(judges=[judge]))
    extract = ["--collection", f"{folder}/collection", "--judge", judge, "--attribute", "bad", "--layers", "0", "1"]
    assert vectors(folder, "extract", "--output", f"{folder}/vectors", *extract) == 0
    texts = ["--texts", prompts, "--rho", "0.2"]
    assert vectors(folder, "scale", "--vectors", f"{folder}/vectors", *texts) == 0
    return folder


def vectors(world, command, *arguments):
    return main(["vectors", command, "--model", str(world / "model"), *arguments])


@pytest.fixture(scope="module")
def to_bad(world):
    """Vectors that point from the output embeddings of good words to those of bad ones."""
    rows = AutoModelForCausalLM.from_pretrained(world / "model").lm_head.weight.detach()
    first = 3  # of the bad words, behind the special tokens
    difference = rows[first : first + len(BAD)].mean(0) - rows[first + len(BAD) :].mean(0)
    save_file({"layer.1": difference}, world / "to_bad.safetensors")
    assert vectors(world, "extract", "--output", f"{world}/to-bad", "--vectors", f"{world}/to_bad.safetensors") == 0
    texts = ["--texts", f"{world}/prompts.txt", "--rho", "0.5"]
    assert vectors(world, "calibrate", "--vectors", f"{world}/to-bad", *texts) == 0  # what `scale` was called
    return world / "to-bad"


def test_vectors_of_a_collection(world):
    found = SteeringVectors.from_pretrained(world / "vectors")
    assert (found.layers, found.attribute, found.provenance["source"]) == ((0, 1), "bad", "collection")
    assert found.rho == pytest.approx(0.2)
    assert "what is added is 20 % of" in (world / "vectors" / "README.md").read_text()


def test_sweep(world, to_bad, capsys):
    sweep = ["--vectors", str(to_bad), "--prompts", f"{world}/prompts.txt", "--output", f"{world}/sweep"]
    sweep += ["--judges", f"lexicon:{world}/bad.txt", "--multipliers", "-1", "40", "--max_new_tokens", "4"]
    assert vectors(world, "sweep", *sweep, "--budget", "5") == 0
    assert "window: -1 to 40" in capsys.readouterr().out
    assert vectors(world, "sweep", *sweep, "--multipliers", "-2", "--budget", "5") == 0
    assert "m -1 " in capsys.readouterr().out  # what was swept before stays
    assert vectors(world, "sweep", *sweep, "--multipliers", "1", "--budget", "5", "--mode", "last_token") == 0
    assert {run["method"] for run in json.loads((world / "sweep" / "sweep.json").read_text())["runs"]} > {"broadcast"}
    assert vectors(world, "sweep", *sweep, "--multipliers", "-2", "--budget", "5") == 0
    document = json.loads((world / "sweep" / "sweep.json").read_text())
    document["runs"] = [run for run in document["runs"] if run["method"] != "last_token"]
    less, more = (next(run for run in document["runs"] if run["multiplier"] == m) for m in (-1, 40))
    base = document["runs"][0]
    assert [run["multiplier"] for run in document["runs"]] == [0, -2, -1, 40]
    shown = {each["multiplier"]: each["texts"] for each in document["examples"]["texts"] if each["multiplier"] != 1}
    assert len(shown) == 4 and all(len(texts) == 3 for texts in shown.values())
    assert "*" in "".join(shown[40]) and not any(word in json.dumps(document["examples"]) for word in BAD)
    for judge in base["judges"]:
        assert less["judges"][judge]["difference_interval"][1] < 0 < more["judges"][judge]["difference_interval"][0]
    assert not more["collapsed"] and not less["collapsed"]
    less["judges"] = {name: {**judge, "rate": 0.0} for name, judge in less["judges"].items()}
    assert sweep_page(document).count("<figure") == 3  # a rate of zero has its place, too
    page = (world / "sweep" / "sweep.html").read_text()
    assert page.count('<section class="texts">') == 3 and "<dt>40</dt>" in page
    assert "Working window" in page and page.count("<figure") == 3 and "Norm of the residual stream" in page


def test_apply_and_bake(world, to_bad, capsys):
    (world / "one.txt").write_text(f"{GOOD[0]} {GOOD[1]}\n")
    chosen = ["--vectors", str(to_bad), "--prompts", f"{world}/one.txt", "--max_new_tokens", "8"]
    assert vectors(world, "apply", *chosen, "--multipliers", "6", "--no-do-sample") == 0
    plain, steered = capsys.readouterr().out.splitlines()[-2:]
    assert plain.startswith("  m 0") and steered.startswith("  m 6") and plain[10:] != steered[10:]
    assert sum(word in BAD for word in steered.split()) > sum(word in BAD for word in plain.split())
    bake = ["--vectors", str(to_bad), "--multiplier", "6", "--output", f"{world}/baked"]
    assert vectors(world, "bake", *bake, "--texts", f"{world}/prompts.txt") == 0
    assert "; 100 % of the greedy tokens are those of the steered model." in capsys.readouterr().out
    assert json.loads((world / "baked" / "steering" / "report.json").read_text())["same_greedy_tokens"] == 1.0
    assert type(AutoModelForCausalLM.from_pretrained(world / "baked")).__name__ == "LlamaForCausalLM"
    assert vectors(world, "bake", *bake) == 2
    assert "there already" in capsys.readouterr().err


def test_extract_from_anything(world, capsys):
    (world / "positive.txt").write_text(f"{GOOD[0]} {BAD[0]}\n{GOOD[1]} {BAD[1]}\n")
    (world / "negative.txt").write_text(f"{GOOD[0]} {GOOD[2]}\n{GOOD[1]} {GOOD[3]}\n")
    random_head(build("llama")).save_pretrained(world / "head")
    sources = {
        "pairs": ["--positive", f"{world}/positive.txt", "--negative", f"{world}/negative.txt", "--method", "pca"],
        "value head": ["--value_head", f"{world}/head", "--texts", f"{world}/prompts.txt"],
        "gguf": ["--vectors", f"{FOLDER}/repeng.gguf"],
    }
    for source, arguments in sources.items():
        output = f"{world}/from {source}"
        assert vectors(world, "extract", "--output", output, *arguments) == 0
        assert SteeringVectors.from_pretrained(output).provenance["source"] == source
    with pytest.raises(SystemExit):
        vectors(world, "extract", "--output", f"{world}/none")
    assert "--positive" in capsys.readouterr().err


def test_pairs_as_messages(world, capsys):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} " + GOOD[7] + "{% endfor %}"
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    sides = [[f"{GOOD[0]} {BAD[0]}", f"{GOOD[1]} {BAD[1]}"], [f"{GOOD[0]} {GOOD[2]}", f"{GOOD[1]} {GOOD[3]}"]]
    found = vectors_from_pairs(model, tokenizer, *sides, chat=True)
    spelled = [[f"{text} {GOOD[7]}" for text in side] for side in sides]
    assert found.fingerprint() == vectors_from_pairs(model, tokenizer, *spelled).fingerprint()
    assert found.fingerprint() != vectors_from_pairs(model, tokenizer, *sides).fingerprint()
    with pytest.raises(SystemExit):
        vectors(world, "extract", "--output", f"{world}/none", "--vectors", f"{FOLDER}/repeng.gguf", "--chat")
    assert "--chat is for --positive and --negative" in capsys.readouterr().err


def test_what_is_not_scaled_says_so_once(world, caplog):
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    found = vectors_from_pairs(model, tokenizer, [BAD[0]], [GOOD[0]], layers=[0, 1])
    assert repr(found) == f"SteeringVectors(layers 0 to 1, {found.width} wide, not scaled)"
    apply._warn_unscaled.cache_clear()
    for each in (found, found, found.scale(model, [[5, 6, 7]])):
        with each.apply(model, 0.1):
            pass
    assert [record.message[:31] for record in caplog.records] == ["These vectors are not scaled: a"]


def test_a_collection_of_another_backbone_is_refused(world):
    from hf_value_steer.training.shards import Collection

    with pytest.raises(ValueError, match="another backbone"):
        vectors_from_collection(build("llama", seed=5), None, Collection(world / "collection"), "lexicon:bad.txt")


def test_window():
    base = {"multiplier": 0.0, "perplexity_ratio": 1.0, "distinct_2": 0.8}
    ratios = {-4.0: 1.2, -2.0: 2.0, -1.0: 1.1, 1.0: 1.1, 2.0: 1.2, 4.0: 0.5}
    runs = [{**base, "multiplier": m, "perplexity_ratio": ratio} for m, ratio in ratios.items()]
    runs[-1]["distinct_2"] = 0.1
    for run in (base, *runs):
        run["collapsed"] = collapsed(run, base, 1.5)
    assert window([base, *runs]) == [-1.0, 2.0]
    assert [run["collapsed"] for run in runs] == [
        *[None, "over the budget of perplexity", None],
        *[None, None, "repeats itself"],
    ]
