"""The doctor passes healthy models, and finds each planted fault by the check that is there for it."""

import json

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from hf_value_steer import ValueHead, ValueHeadConfig
from hf_value_steer.backbone.parts import fingerprint
from hf_value_steer.cli import main
from hf_value_steer.doctor import diagnose
from hf_value_steer.generation.cache import LiveCache
from hf_value_steer.generation.kernels import Expanded, choose_kernel
from hf_value_steer.generation.shared_prefix import SharedPrefixLayer
from tests.families import FAMILIES, accepting_head, build, layered_head, random_head


NAMES = ["host", "feature", "head", "kernel", "identity", "layers", "cache", "drift", "padding", "evaluation", "speed"]


def failed(checks):
    return {check.name for check in checks if check.status == "FAIL"}


def own_head(model, **config):
    head = random_head(model)
    head.config.backbone_fingerprint = fingerprint(model)
    head.config.update(config)
    return head


@pytest.mark.parametrize("family", FAMILIES)
def test_a_healthy_model_passes_every_check(family):
    model = build(family)
    checks = diagnose(model, own_head(model))
    assert [check.name for check in checks] == NAMES
    assert {check.name: check.status for check in checks} == {
        name: "info" if name in ("kernel", "drift", "speed", "evaluation") else "ok" for name in NAMES
    }


@pytest.mark.parametrize("temporal", ["none", "mean", "ema"])
@pytest.mark.parametrize("layers", [[0], [-1, "final"]], ids=str)
def test_a_head_on_layers_and_over_time_passes_every_check(llama, layers, temporal):
    head = layered_head(llama, layers, temporal)
    checks = {check.name: check for check in diagnose(llama, head)}
    assert list(checks) == NAMES and not failed(checks.values())
    assert checks["cache"].numbers["interventions_lazy"] > 0 and checks["drift"].numbers["max_abs_dvalue"] < 1e-4
    names = [layer % 2 if layer != "final" else layer for layer in layers]
    assert set(checks["layers"].numbers) == {f"{what}_{name}" for what in ("norm", "difference") for name in names}


def test_a_layer_that_decodes_otherwise_is_found():
    model = build("llama")
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(lambda _module, _args, output: output * (1.01 if output.shape[1] == 1 else 1.0))
    checks = {check.name: check for check in diagnose(model, layered_head(model, [0]))}
    assert checks["layers"].status == "FAIL" and "layer 0 differs by" in checks["layers"].detail


def test_a_norm_unlike_that_of_training_is_found(llama):
    head = layered_head(llama, [0, "final"])
    norms = {check.name: check for check in diagnose(llama, head)}["layers"].numbers
    head.config.feature_norms = [norms["norm_0"] / 2, norms["norm_final"] * 2]
    assert not failed(diagnose(llama, head))
    head.config.feature_norms = [norms["norm_0"], norms["norm_final"] * 5]
    checks = {check.name: check for check in diagnose(llama, head)}
    assert failed(checks.values()) == {"layers"} and "the norm at layer final is" in checks["layers"].detail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_without_a_head(dtype):
    checks = {check.name: check for check in diagnose(build("llama").to(dtype), num_candidates=4)}
    assert not failed(checks.values())
    assert checks["head"].status == "n.a." and checks["drift"].numbers["tokens"] == 64


def test_it_leaves_the_generator_and_the_model_as_they_were(llama):
    state, before = torch.get_rng_state(), fingerprint(llama)
    diagnose(llama)
    assert torch.equal(torch.get_rng_state(), state) and fingerprint(llama) == before
    assert llama.config._attn_implementation == "sdpa"


class Tap(nn.Linear):
    """An identity that stands where the feature is read."""

    def __init__(self, width):
        super().__init__(width, width, bias=False)
        nn.init.eye_(self.weight)


class NormThenHead(nn.Linear):
    """An output embedding that does the final norm itself."""

    def forward(self, hidden_states):
        return super().forward(nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:]))


def with_tap():
    """A model whose output embedding, by its own account, is a module before the final norm."""
    model = build("llama")
    tap = Tap(model.config.hidden_size)
    model.model.norm = nn.Sequential(tap, model.model.norm)
    model.get_output_embeddings = lambda: tap
    return model


def test_a_hook_that_reads_before_the_final_norm_is_found():
    model = with_tap()
    check = diagnose(model, random_head(model))[1]
    assert (check.name, check.status) == ("feature", "FAIL") and "does not consume last_hidden_state" in check.detail


def test_a_norm_inside_the_output_embedding_is_found():
    model = build("llama")
    head = NormThenHead(model.config.hidden_size, model.config.vocab_size, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head, model.model.norm = head, nn.Identity()
    check = diagnose(model)[1]
    assert (check.name, check.status) == ("feature", "FAIL") and "not linear" in check.detail


@pytest.mark.parametrize("owner, method", [(LiveCache, "overwrite_last"), (DynamicLayer, "crop")])
def test_a_cache_that_does_not_roll_back_is_found(monkeypatch, owner, method):
    model = build("llama")

    def nothing(self, tokens_to_remove, *_):
        pass

    monkeypatch.setattr(owner, method, nothing)
    checks = diagnose(model, own_head(model))
    assert failed(checks) == {"cache"}
    assert "rollback fails" in next(check.detail for check in checks if check.name == "cache")


def test_a_head_that_never_intervenes_is_found(llama):
    checks = {check.name: check for check in diagnose(llama, accepting_head(llama))}
    assert failed(checks.values()) == {"cache"} and "never intervened" in checks["cache"].detail


def test_a_kernel_that_forgets_the_prefix_is_found(monkeypatch):
    monkeypatch.setattr(
        "hf_value_steer.generation.shared_prefix.attend_prefix",
        lambda queries, *_: (torch.zeros_like(queries), torch.full(queries.shape[:-1], -torch.inf)),
    )
    model = build("llama")
    assert failed(diagnose(model, own_head(model))) == {"cache", "drift"}
    assert SharedPrefixLayer is choose_kernel("auto", model).layer


def test_a_model_that_ignores_padding_is_found():
    model = build("llama")
    forward = model.forward
    model.forward = lambda **kwargs: forward(**kwargs | {"attention_mask": None, "position_ids": None})
    checks = {check.name: check for check in diagnose(model, own_head(model))}
    assert checks["padding"].status == "FAIL" and "pass prompts of one length" in checks["padding"].detail


def test_the_kernel_and_why_no_faster_one(monkeypatch):
    model = build("llama")
    monkeypatch.setattr("hf_value_steer.generation.kernels.SHARED_PREFIX", frozenset())
    monkeypatch.setattr("hf_value_steer.generation.kernels.MASKED", frozenset())
    assert isinstance(choose_kernel("auto", model), Expanded)
    check = next(check for check in diagnose(model) if check.name == "kernel")
    assert check.status == "info" and check.detail.startswith("Expanded. ")
    assert "'shared_prefix' cannot be used" in check.detail and "'masked' cannot be used" in check.detail


def test_a_failing_check_does_not_stop_the_others(monkeypatch, llama):
    monkeypatch.setattr("hf_value_steer.generation.validation.VERIFIED", frozenset())
    checks = {check.name: check for check in diagnose(llama)}
    assert list(checks) == NAMES
    assert checks["kernel"].status == "FAIL" and "was not verified for model type 'llama'" in checks["kernel"].detail
    assert checks["feature"].status == "ok" and checks["speed"].status == "FAIL"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a model, of its head, of a head for other weights and of a head of another width."""
    root = tmp_path_factory.mktemp("doctor")
    model = build("llama")
    model.save_pretrained(root / "model")
    own_head(model).save_pretrained(root / "head")
    own_head(model, backbone="org/other", backbone_fingerprint="0" * 16).save_pretrained(root / "other")
    ValueHead(ValueHeadConfig(hidden_size=48)).save_pretrained(root / "wide")
    return root


def run(capsys, *arguments):
    status = main(["doctor", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_the_command_prints_a_table(capsys, folders):
    status, out = run(capsys, folders / "model", "--value-head", folders / "head", "--device", "cpu")
    lines = out.splitlines()
    assert status == 0 and lines[0].split() == ["check", "result", "detail"]
    assert [line.split()[0] for line in lines[1:] if line[:1].strip()][: len(NAMES)] == NAMES
    assert "FAIL" not in out


def test_the_command_prints_json(capsys, folders):
    status, out = run(capsys, folders / "model", "--json", "--dtype", "bfloat16")
    report = json.loads(out)
    assert status == 0 and report["dtype"] == "bfloat16"
    assert [check["name"] for check in report["checks"]] == NAMES
    assert report["checks"][-1]["numbers"]["ratio"] > 0


@pytest.mark.parametrize(
    "head, message",
    [
        ("other", "was trained on backbone 'org/other' with fingerprint 0000000000000000"),
        ("wide", "was trained on hidden_size=48"),
        ("nowhere", "nowhere"),
    ],
)
def test_a_head_that_does_not_belong_here_is_found(capsys, folders, head, message):
    status, out = run(capsys, folders / "model", "--value-head", folders / head, "--json")
    checks = json.loads(out)["checks"]
    assert status == 1
    assert [check["name"] for check in checks if check["status"] == "FAIL"] == ["head"]
    assert message in checks[2]["detail"]


def test_a_planted_fault_ends_the_command_with_an_error(capsys, monkeypatch, folders):
    with monkeypatch.context() as patch:
        patch.setattr(DynamicLayer, "crop", lambda *_: None)
        status, out = run(capsys, folders / "model")
    out = " ".join(out.split())
    assert status == 1 and "cache FAIL RuntimeError: the cache of 27 tokens holds 28: rollback fails" in out
    monkeypatch.setattr("hf_value_steer.cli.doctor.AutoModelForCausalLM.from_pretrained", lambda *_, **__: with_tap())
    status, out = run(capsys, folders / "model")
    assert status == 1 and "feature     FAIL    the output embedding does not consume" in out


def test_a_model_that_does_not_load(capsys, tmp_path):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "cannot load" in capsys.readouterr().err
