"""What the adapter takes for granted of vLLM's internals, checked without running them: `doctor --vllm`."""

import vllm
from packaging.version import Version

from hf_value_steer.doctor.context import Check
from hf_value_steer.hosts.bindings import Problems, Table, attributes, differences, fields, parameters, size
from hf_value_steer.vllm.refusals import VALIDATED


_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_SAMPLER = "vllm.v1.sample.sampler:Sampler"
_SAMPLER_V2 = "vllm.v1.worker.gpu.sample.sampler:Sampler"
_ENTRYPOINTS = "vllm.entrypoints"
_ARGUMENTS = f"{_ENTRYPOINTS}.{'common' if Version(vllm.__version__) >= Version('0.33') else 'launchers'}.cli_args"

PARAMETERS: dict[str, str] = {
    f"{_V1}.execute_model": "scheduler_output intermediate_tensors",
    f"{_V1}.sample_tokens": "grammar_output",
    f"{_V1}._sample": "logits spec_decode_metadata",
    f"{_V2}.execute_model": "scheduler_output",
    f"{_V2}.sample_tokens": "grammar_output",
    f"{_V2}.sample": "hidden_states input_batch grammar_output",
    f"{_V2}.postprocess_sampled": "idx_mapping sampled_tokens num_sampled num_rejected query_start_loc",
    "vllm.v1.worker.worker_base:WorkerBase.compile_or_warm_up_model": "",
    f"{_SAMPLER}.sample": "logits sampling_metadata",
    f"{_SAMPLER}.gather_logprobs": "logprobs num_logprobs token_ids",
    f"{_SAMPLER_V2}.sample": (
        "logits expanded_idx_mapping idx_mapping idx_mapping_np pos input_ids expanded_local_pos "
        "seq_lens_upper_bound_np return_logprobs"
    ),
    f"{_SAMPLER_V2}._sample_random": (
        "processed_logits expanded_idx_mapping idx_mapping_np pos top_k top_p use_fused_sampler *"
    ),
    f"{_SAMPLER_V2}.get_logprobs_dims": "idx_mapping_np",
    "vllm.v1.worker.gpu.sample.logprob:compute_topk_scores": "logits num_logprobs sampled_token_ids logits_mode",
    "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler.forward_native": "logits generators k p",
    "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p": "logits k p",
    f"{_SCHEDULER}.__init__": "kv_cache_config block_size *",
    f"{_SCHEDULER}.update_from_output": "scheduler_output model_runner_output",
    f"{_SCHEDULER}.finish_requests": "request_ids finished_status",
    f"{_SCHEDULER}._free_request": "request",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler.update_from_output": "scheduler_output model_runner_output",
    "vllm.v1.worker.utils:AttentionGroup.build_metadata": "common_attn_metadata kwargs",
    "vllm:LLM.collective_rpc": "method",
    "vllm.config:ModelConfig.get_diff_sampling_param": "",
    "vllm.v1.worker.utils:copy_kv_cache_blocks_inplace": "kv_caches num_blocks kv_cache_block_copies",
    "vllm.forward_context:set_forward_context": "attn_metadata vllm_config num_tokens slot_mapping",
    "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor.apply": "logits ctx",
    "vllm.v1.sample.logits_processor.interface:LogitsProcessor.validate_params": "sampling_params",
    "vllm.v1.engine.async_llm:AsyncLLM.generate": "prompt sampling_params request_id *",
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": "engine_core_outputs *",
    f"{_ENTRYPOINTS}.launchers.api_server.entry:run_server": "args",
    "vllm.utils.cpu_resource_utils:get_memory_node_info": "node_id",
    "vllm.utils.cpu_resource_utils:get_visible_memory_node": "",
    f"{_ARGUMENTS}:make_arg_parser": "parser",
    f"{_ARGUMENTS}:validate_parsed_serve_args": "args",
}
FIELDS = {
    "vllm.v1.core.sched.output:SchedulerOutput": "finished_req_ids scheduled_cached_reqs scheduled_new_reqs",
    "vllm.v1.core.sched.output:NewRequestData": "req_id sampling_params",
    "vllm.v1.core.sched.output:CachedRequestData": "req_ids resumed_req_ids num_computed_tokens num_output_tokens",
    "vllm.v1.outputs:ModelRunnerOutput": "req_ids req_id_to_index sampled_token_ids logprobs",
    "vllm.v1.outputs:LogprobsLists": "logprob_token_ids logprobs sampled_token_ranks",
    "vllm.v1.outputs:LogprobsTensors": "logprob_token_ids logprobs selected_token_ranks",
    "vllm.v1.worker.gpu.sample.output:SamplerOutput": "sampled_token_ids logprobs_tensors",
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        "req_ids idx_mapping idx_mapping_np num_scheduled_tokens num_computed_tokens_np prefill_len_np logits_indices"
    ),
    "vllm.v1.engine:EngineCoreOutput": "request_id new_token_ids finish_reason events kv_transfer_params",
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs num_actual_tokens "
        "max_query_len max_seq_len block_table_tensor slot_mapping is_prefilling positions"
    ),
    "vllm.v1.kv_cache_interface:KVCacheConfig": "num_blocks kv_cache_groups",
    "vllm.v1.worker.utils:AttentionGroup": "backend layer_names",
    "vllm.utils.cpu_resource_utils:MemoryNodeInfo": "total_memory available_memory",
    "vllm.sampling_params:SamplingParams": "extra_args structured_outputs logprob_token_ids thinking_token_budget",
}
ATTRIBUTES = {
    "vllm.config:VllmConfig": "use_v2_model_runner",
    _V1: "discard_request_mask input_batch execute_model_state attn_groups kv_caches requests sampler model",
    _V2: "req_states block_tables attn_groups kv_caches kv_cache_config sampler model max_num_reqs max_model_len",
    _SAMPLER_V2: "penalties_state logprobs_mode logits_processors",
    "vllm.v1.worker.gpu.states:RequestState": "last_sampled_tokens all_token_ids prompt_len num_computed_tokens",
    "vllm.v1.worker.gpu.sample.penalties:PenaltiesState": "output_bin_counts",
    "vllm.v1.worker.gpu.block_table:BlockTables": "block_tables block_sizes",
    "vllm.v1.worker.gpu.async_utils:AsyncOutput": "model_runner_output",
    "vllm.v1.request:Request": "drop_stale_output num_stale_output_tokens",
    _SCHEDULER: "num_lookahead_tokens requests block_size max_model_len",
    "vllm.v1.worker.gpu_input_batch:InputBatch": (
        "token_ids_cpu is_token_ids num_tokens_no_spec generators block_table logitsprocs sampling_metadata"
    ),
    "vllm.v1.worker.block_table:BlockTable": "block_size",
    "vllm.v1.engine.async_llm:AsyncLLM": "output_processor",
    "vllm.v1.engine.output_processor:OutputProcessor": "request_states",
    "vllm.v1.engine.output_processor:RequestState": "external_req_id request_index",
}


def check_vllm() -> list[Check]:
    """The version, and every function, field and attribute that the adapter binds to."""
    version = vllm.__version__
    detail = f"{version}; validated: {', '.join(VALIDATED)}"
    checks = [Check("version", "ok" if version.startswith(VALIDATED) else "FAIL", detail)]
    kinds: tuple[tuple[str, Table, Problems], ...] = (
        ("calls", PARAMETERS, parameters),
        ("fields", FIELDS, fields),
        ("state", ATTRIBUTES, attributes),
    )
    return [*checks, *(_check(name, table, problems) for name, table, problems in kinds)]


def _check(name: str, table: Table, problems: Problems) -> Check:
    if found := differences(table, problems):
        return Check(name, "FAIL", f"differs: {', '.join(found)}")
    return Check(name, "ok", f"{size(table)} are there")
