"""`doctor --vllm`: passes on the installed vLLM, and says what is missing from another."""

import pytest


def test_the_installed_vllm_is_compatible(capsys: pytest.CaptureFixture[str]) -> None:
    from hf_value_steer.cli import main

    assert main(["doctor", "--vllm"]) == 0
    assert "validated: 0.32" in capsys.readouterr().out


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.v1.worker.gpu.sample.sampler import Sampler as V2Sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from hf_value_steer.vllm import compatibility

    monkeypatch.setattr(GPUModelRunner, "_sample", lambda _runner, _scores: None)
    monkeypatch.setattr(V2Sampler, "_sample_random", lambda _sampler, _scores: None)
    monkeypatch.setattr(V2Sampler, "get_logprobs_dims", lambda _sampler, idx_mapping_np, more: (idx_mapping_np, more))
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    monkeypatch.setitem(compatibility.FIELDS, "vllm.v1.outputs:ModelRunnerOutput", "sampled_tokens")
    monkeypatch.setitem(compatibility.ATTRIBUTES, "vllm.v1.worker.block_table:BlockTable", "size_of_block")
    checks = compatibility.check_vllm()
    assert [check.status for check in checks] == ["FAIL"] * 4
    said = " ".join(check.detail for check in checks)
    gone = ("_sample logits", "_sample_random processed_logits", "sampled_tokens", "size_of_block")
    for name in ("0.31.0", *gone, "get_logprobs_dims demands more"):
        assert name in said
