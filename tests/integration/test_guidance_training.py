"""Training of guidance modules with a tiny model: forward against the oracle, losses, and what a stop leaves."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, EvalPrediction

from hf_value_steer import GuidanceConfig, GuidanceModule, value_steer_generate
from hf_value_steer.arguments.collect import CollectArguments, LabelArguments
from hf_value_steer.arguments.guidance import GuidanceTrainArguments
from hf_value_steer.cli import main
from hf_value_steer.recipe import run_recipe
from hf_value_steer.training.collect import collect
from hf_value_steer.training.guidance import stages
from hf_value_steer.training.guidance.data import disliked_tokens, judged_next
from hf_value_steer.training.guidance.moments import GuidedMoments
from hf_value_steer.training.guidance.stages import avoidance, divergence, manifold_loss
from hf_value_steer.training.guidance.train import train_guidance
from hf_value_steer.training.shards import Collection
from hf_value_steer.training.targets import Targets
from tests.families import build, prompts
from tests.guidance_oracle import guided_logits
from tests.parity.test_guidance import make_module
from tests.tiny_text import write_world


@pytest.mark.parametrize("neutral", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_moments_are_guided_as_steps_of_generate(family, neutral):
    model, inputs, prompt = build(family), prompts(3, 18), 11
    module = make_module(model)
    inputs["attention_mask"][:, 10:] = 1  # every prompt has a token
    inputs["attention_mask"][1, 15:] = 0  # and one response is shorter
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    torch.manual_seed(0)
    guided = GuidedMoments(model, module, 99, neutral)(inputs, prompt)
    chosen = set(zip(guided.rows.tolist(), guided.steps.tolist(), strict=True))
    assert len(chosen) == len(guided.rows)
    for row, start in enumerate(inputs["attention_mask"].argmax(dim=1).tolist()):
        for step in range(4 if row == 1 else 7):
            text = inputs["input_ids"][row, start : prompt + step]
            oracle = guided_logits(model, module, text, len(text), 0, 0.0, neutral, prompt - start)
            assert ((row, step) in chosen) == oracle[1][0]
            if (row, step) in chosen:
                here = (guided.rows == row) & (guided.steps == step)
                torch.testing.assert_close(guided.logits[here], oracle[0], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(guided.base[here], model(text[None]).logits[:, -1], rtol=1e-4, atol=1e-4)
    guided.logits.sum().backward()
    assert module.generator.seeds.grad.abs().sum() > 0


def test_losses_by_hand():
    bridges = torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]])  # norms 5 and 1
    states = torch.tensor([[0.0, 4.0], [1.0, 0.0]])  # made from those of norms 4 and 1
    assert manifold_loss(bridges, states, 0.2).item() == pytest.approx((0.25 - 0.2) / 2)
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]), torch.tensor([[0.25, 0.25, 0.5], [0.6, 0.3, 0.1]])
    disliked = torch.tensor([[True, False, False], [False, False, False]])
    torch.testing.assert_close(avoidance(p.log(), disliked), torch.tensor([-math.log(1 - 0.5), 0.0]))
    by_hand = 1 / 3 * math.log((1 / 3) / 0.6) + 2 / 3 * math.log((2 / 3) / 0.4)
    torch.testing.assert_close(divergence(p.log(), q.log(), disliked), torch.tensor([by_hand, 0.0]))


def test_what_the_judge_read_at_each_step(world):
    folder, judge = world
    targets = Targets(Collection(folder / "collection"), [judge], "hazard")
    labels, rows = targets.labels[0], range(len(targets.responses))
    disliked = disliked_tokens(targets, rows, 200)
    assert disliked.any() and not disliked.all()
    for row in rows:
        tokens = targets.collection.read("tokens", row).long()
        known, rises = judged_next(targets, row, tokens)
        assert known.shape == rises.shape == (len(tokens), 5) and (known[0, :-1] == -1).all()
        before = labels.read("prefixes", row)
        for step in range(1, len(tokens)):
            if before[step - 1] > 0.5:
                assert (known[step, :-1] == -1).all()
            else:
                assert (known[step, :-1] == targets.collection.read("next_tokens", row)[step - 1]).all()
                assert (rises[step, :-1] == (labels.read("next", row)[step - 1] > 0.5 + before[step - 1])).all()


def test_what_the_next_token_risks(world):
    folder, judge = world
    collection = Collection(folder / "collection")
    targets = Targets(collection, [judge], "risk")
    for row in range(len(targets.responses)):
        labels, probabilities = targets.labels[0], collection.read("next_probabilities", row).float()
        before, risk = labels.read("prefixes", row), targets.of(row)
        for step, scores in enumerate(labels.read("next", row)):
            by_hand = sum(p * max(s - before[step], 0) for p, s in zip(probabilities[step], scores, strict=True))
            assert risk[step] == pytest.approx(float(by_hand), abs=1e-5)


def test_a_value_that_finds_the_labels_captures_them():
    labels, logits = torch.zeros(1, 20), torch.arange(20.0)[None]
    labels[0, :3] = labels[0, 19] = 0.25
    assert stages.discrimination(EvalPrediction(logits, labels))["captured"] == 0.25


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A labelled collection of a tiny model."""
    folder = write_world(tmp_path_factory.mktemp("svgt"), 24)
    judge = f"lexicon:{folder / 'bad.txt'}"
    collect(
        CollectArguments(
            output=str(folder / "collection"), model=str(folder / "model"), prompts=str(folder / "prompts.txt"),
            samples=4, max_new_tokens=10, next_tokens=4, batch_size=8,
        ),
        LabelArguments(judges=[judge], prefixes=True, prefix_words=1),
    )  # fmt: skip
    return folder, judge


def arguments(world, output, **options):
    folder, judge = world
    return GuidanceTrainArguments(
        collection=str(folder / "collection"), model=str(folder / "model"), output=str(output), judge=judge,
        **{"target": "hazard", "bridge_heads": 4, "text_epochs": 4, "pair_epochs": 2, "bridge_epochs": 2,
           "text_rate": 1e-2, "bridge_rate": 3e-3, "avoid": 1.0, "keep": 1.0, "guided_share": 0.7, "validation": 0.25,
           "calibration": 0.0, "batch_rows": 16, "trainer": ["disable_tqdm=true"], **options},
    )  # fmt: skip


def test_a_training_that_was_stopped_goes_on_to_the_same_module(world, tmp_path, monkeypatch):
    whole = train_guidance(arguments(world, tmp_path / "whole"))
    assert (whole.config.layer, whole.config.num_bridges, whole.config.value_width) == (0, 5, 128)
    assert whole.config.training["stages"]["text"]["auroc"] > 0.6
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "training.json",
    ]  # fmt: skip

    class Stopped(Exception):
        pass

    for stage, kind in (("pair", stages.ValueStage), ("bridge", stages.BridgeStage)):
        forward, calls = kind.forward, []

        def stopping(self, *args, forward=forward, calls=calls, stage=stage, **kwargs):
            calls.append(self.training)
            if sum(calls) > 5 and (stage == "bridge" or self.conditional):
                raise Stopped
            return forward(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(kind, "forward", stopping)
            train_guidance(arguments(world, tmp_path / "stopped"))
    again = train_guidance(arguments(world, tmp_path / "stopped"))
    assert again.fingerprint() == whole.fingerprint()
    assert train_guidance(arguments(world, tmp_path / "whole")).fingerprint() == whole.fingerprint()
    with pytest.raises(ValueError, match="was trained otherwise"):
        train_guidance(arguments(world, tmp_path / "whole", seed=3))
    model = AutoModelForCausalLM.from_pretrained(world[0] / "model")
    out = model.generate(
        torch.tensor([[20, 30, 40]]), custom_generate=value_steer_generate, max_new_tokens=4,
        value_steer=GuidanceConfig(module=str(tmp_path / "whole")), return_dict_in_generate=True,
    )  # fmt: skip
    assert out.guided.shape == out.token_values.shape


def test_targets_of_whole_responses(world, tmp_path):
    """Which have one more, of the prompt's last token; the sweep over layers reads them, too."""
    short = {"text_epochs": 1, "pair_epochs": 1, "bridge_epochs": 1}
    module = train_guidance(arguments(world, tmp_path / "module", target="response", **short))
    assert set(module.config.training["stages"]) == {"text", "pair", "bridge"}


def test_what_cannot_be_trained_is_refused_before_it_is(world, tmp_path):
    folder, judge = world
    with pytest.raises(ValueError, match="`layer` has to be below 1, the last layer"):
        train_guidance(arguments(world, tmp_path / "module", layer=1, num_bridges=2, value_width=16))
    plain = CollectArguments(
        output=str(tmp_path / "plain"), model=str(folder / "model"), prompts=str(folder / "prompts.txt"),
        samples=2, max_new_tokens=10, batch_size=8,
    )  # fmt: skip
    collect(plain, LabelArguments(judges=[judge]))
    changed = {"collection": str(tmp_path / "plain"), "target": "response"}
    given = GuidanceTrainArguments(**{**vars(arguments(world, tmp_path / "module")), **changed})
    with pytest.raises(ValueError, match="Stage `bridge` learns from scores of prefixes"):
        train_guidance(given)


@pytest.mark.parametrize("options", [{"injection": "inject", "manifold": 0.0}, {"conditional": False}])
def test_ablations(world, tmp_path, options):
    short = {"text_epochs": 1, "pair_epochs": 1, "bridge_epochs": 1, "layer": 0, "num_bridges": 2, "value_width": 16}
    module = train_guidance(arguments(world, tmp_path / "module", **short | options))
    assert ("pair" in module.config.training["stages"]) == module.config.conditional


@pytest.mark.parametrize("name", ["guidance", "svgt"])  # the second is what it was called
def test_the_command(world, tmp_path, capsys, name):
    folder, judge = world
    command = [name, "train", "--collection", str(folder / "collection"), "--model", str(folder / "model")]
    sizes = ["--layer", "0", "--num_bridges", "2", "--value_width", "16", "--bridge_heads", "4", "--target", "hazard"]
    epochs = ["--text_epochs", "1", "--pair_epochs", "1", "--bridge_epochs", "1", "--validation", "0.25"]
    assert main([*command, "--judge", judge, "--output", str(tmp_path / "module"), *sizes, *epochs]) == 0
    assert "auroc" in capsys.readouterr().out
    assert GuidanceModule.from_pretrained(tmp_path / "module").config.backbone.endswith("model")


def test_a_recipe_without_a_head(world, tmp_path):
    (folder, judge), output = world, tmp_path / "run"
    small = {"layer": 0, "num_bridges": 2, "value_width": 16, "bridge_heads": 4, "target": "hazard"}
    recipe = {
        "output": str(output),
        "collect": {
            "model": str(folder / "model"), "prompts": str(folder / "prompts.txt"),
            "samples": 4, "max_new_tokens": 10, "next_tokens": 4, "batch_size": 8,
        },
        "label": {"judges": [judge], "prefixes": True, "prefix_words": 1},
        "guide": {**small, "text_epochs": 1, "pair_epochs": 1, "bridge_epochs": 1, "validation": 0.25},
    }  # fmt: skip
    with pytest.raises(ValueError, match="The recipe, guide.epocs: .*`epocs`"):
        run_recipe(recipe | {"guide": {"epocs": 1}})
    for change in ({"calibrate": {}}, {"push": {"repo_id": "me/head"}}):
        with pytest.raises(ValueError, match="lacks train"):
            run_recipe(recipe | change)
    with pytest.raises(ValueError, match="needs `prefixes: true` in section 'label'"):
        run_recipe(recipe | {"label": {"judges": [judge]}})
    for change, message in (
        ({"target": "rsik"}, "guide.target: has to be one of response, prefix, hazard, risk, got 'rsik'"),
        ({"injection": "injct"}, "guide.injection: has to be one of bridge, inject"),
        ({"text_rate": "1e-3"}, "guide.text_rate: has to be a number, got '1e-3'"),
        ({"layer": "first"}, "guide.layer: has to be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            run_recipe(recipe | {"guide": small | change})
    assert not output.exists()
    assert run_recipe(recipe) == output / "module"
    module = GuidanceModule.from_pretrained(output / "module")
    assert (module.config.num_bridges, module.config.training["judge"]) == (2, judge)
    assert not (output / "head").exists()
