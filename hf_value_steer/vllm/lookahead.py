"""Forwards of single tokens beside the step of the batch: at their own place in the cache, or on scratch blocks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from hf_value_steer.vllm.filtering import Pending


MOST_SCRATCH_BLOCKS = 64


def scratch_blocks(num_blocks: int) -> range:
    """The blocks at the end of the cache that the scheduler never hands out; at most an eighth of it."""
    return range(num_blocks - max(1, min(MOST_SCRATCH_BLOCKS, num_blocks // 8)), num_blocks)


class ExtraForwards:
    """The extra forwards of a model runner, over a cache of one group.

    The runner calls [`in_place`] for first tokens and [`commit`] for winners; the filter calls [`aside`] for
    alternatives. Tokens go in, and features come out.

    Args:
        runner: the model runner; its block tables and cache are read when they are needed.
    """

    def __init__(self, runner: Any):
        self.runner = runner
        self.jobs: Sequence[tuple[Pending, int]] = ()
        self.held: dict[int, int] = {}

    def in_place(self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Forward one token for each row at its own place in the cache; features `(rows, width)`."""
        return self._forward(rows, tokens, positions, self._blocks(rows, positions))

    def aside(self, jobs: Sequence[tuple[Pending, int]]) -> Tensor:
        """Forward alternatives on copies of the blocks that they would be written to; features `(jobs, width)`.

        More alternatives than scratch blocks take turns; the blocks of the last turn stay for [`commit`].
        """
        scratch, features = self._scratch(), []
        self.jobs = jobs
        for start in range(0, len(jobs), len(scratch)):
            turn = jobs[start : start + len(scratch)]
            rows = [pending.row for pending, _ in turn]
            positions = [pending.position for pending, _ in turn]
            blocks = scratch[: len(turn)]
            self._copy(self._blocks(rows, positions), blocks)
            features.append(self._forward(rows, [token for _, token in turn], positions, blocks))
            self.held = {start + index: block for index, block in enumerate(blocks)}  # the turn before is lost
        return torch.cat(features)

    def commit(self, chosen: Sequence[int]) -> None:
        """Put keys and values of the chosen jobs into their rows; what is not held any more is forwarded again."""
        held = [job for job in chosen if job in self.held]
        if held:
            places = [self.jobs[job][0] for job in held]
            targets = self._blocks([place.row for place in places], [place.position for place in places])
            self._copy([self.held[job] for job in held], targets)
        again = [self.jobs[job] for job in chosen if job not in self.held]
        if again:
            pending = [place for place, _ in again]
            self.in_place(
                [place.row for place in pending], [token for _, token in again], [place.position for place in pending]
            )

    def _scratch(self) -> range:
        """The scratch blocks of one turn. On accelerators attention has buffers for `max_num_reqs` rows only."""
        blocks = scratch_blocks(self.runner.kv_cache_config.num_blocks)
        return blocks if self.runner.device.type == "cpu" else blocks[: self.runner.max_num_reqs]

    def _blocks(self, rows: Sequence[int], positions: Sequence[int]) -> list[int]:
        """The block that holds each position."""
        tables, size = self.runner.block_tables_of(rows)
        columns = torch.tensor(positions, device=tables.device)[:, None] // size
        blocks: list[int] = tables.gather(1, columns).squeeze(1).tolist()
        return blocks

    def _copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        pairs = [KVCacheBlockCopy(*pair) for pair in zip(sources, targets, strict=True)]
        copy_kv_cache_blocks_inplace(self.runner.kv_caches, self.runner.kv_cache_config.num_blocks, pairs)

    def _forward(
        self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int], blocks: Sequence[int]
    ) -> Tensor:
        """One decode step of `len(rows)` sequences, each written to the block that is given for it."""
        runner, device, count = self.runner, self.runner.device, len(rows)
        tables, size = runner.block_tables_of(rows)
        places = torch.tensor(positions, dtype=torch.long, device=device)
        written = torch.tensor(blocks, dtype=torch.long, device=device)
        tables[torch.arange(count, device=device), places // size] = written.to(tables.dtype)
        slots = written * size + places % size
        lengths = (places + 1).to(torch.int32)
        starts = torch.arange(count + 1, dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(device),
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths.cpu(),
            num_reqs=count,
            num_actual_tokens=count,
            max_query_len=1,
            max_seq_len=max(positions) + 1,
            block_table_tensor=tables,
            slot_mapping=slots,
            is_prefilling=torch.zeros(count, dtype=torch.bool),
            positions=places,
        )
        attention = {}
        for group in runner.attn_groups[0]:
            metadata = group.build_metadata(common, fast_build=True)
            attention.update(dict.fromkeys(group.layer_names, metadata))
        layers = runner.kv_cache_config.kv_cache_groups[0].layer_names
        with set_forward_context(
            attention, runner.vllm_config, num_tokens=count, slot_mapping=dict.fromkeys(layers, slots)
        ):
            ids = torch.tensor(tokens, dtype=torch.int32, device=device)
            features: Tensor = runner.model(
                input_ids=ids, positions=places, intermediate_tensors=None, inputs_embeds=None
            )
            return features
