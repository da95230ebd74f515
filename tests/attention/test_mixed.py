# SPDX-License-Identifier: Apache-2.0
"""Mixed batches: every field of SGLang's batch is either cut or the same for both parts."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from fairkv_sglang.attention import mixed
from fairkv_sglang.attention.forward_spans import ForwardSpans, PromptSpan
from fairkv_sglang.attention.mixed import prompts_only, running_only

# Two prompts of 3 and 4 tokens, of which the second has 6 cached, and two running requests.
SPANS = ForwardSpans((PromptSpan(5, 0, 3, 3, 9), PromptSpan(2, 3, 4, 10, 10)), decode_rows=(7, 1))
REQUESTS, TOKENS = 4, 9
FIELDS = {field.name for field in dataclasses.fields(ForwardBatch)}

# Why a field need not be cut. One of a newer SGLang has to be put somewhere.
REASONS = {
    "one for the whole pass": """
        forward_mode seq_lens_sum batch_size extend_num_tokens return_logprob is_prefill_only
        spec_algorithm dimensions return_pooled_hidden_states is_extend_in_batch
        dp_spec_prefill_coordination_applied can_run_decode_cuda_graph can_run_dp_draft_cuda_graph
        can_run_dp_prefill_cuda_graph dp_prefill_cuda_graph_max_prefix_len global_forward_mode
        residual_stream tbo_split_seq_index sampling_info spec_info capture_hidden_mode
        defer_logits_to_eager return_hidden_states_before_norm reuse_dsa_topk_indices
        minimax_m3_precached_sparse_layers global_num_token_non_padded
        global_num_token_non_padded_cpu num_token_non_padded attn_tp_sequence_sharded
        max_seq_len_override forward_metadata_ready forward_metadata_planned_bs
        forward_metadata_planned_num_tokens forward_metadata_replan_equivalent split_index
        encoder_swa_replay
    """,
    "for models that FairKV does not serve": """
        out_cache_loc_dsv4 mamba_track_indices mamba_track_mask mamba_track_seqlens
        mamba_prefill_track_mask_cpu mamba_track_seqlens_cpu mamba_cow_src_indices
        mamba_cow_dst_indices mamba_clear_indices encoder_lens encoder_out_cache_loc encoder_cached
        encoder_lens_cpu cross_attention_custom_mask token_type_ids replace_embeds replace_positions
        mm_inputs mm_token_modalities mm_input_embeds mrope_positions multi_gate_indices
        ngram_embedding_info engram_history
    """,
    "not read by attention": """
        input_embeds top_logprobs_nums token_ids_logprobs extend_logprob_start_lens_cpu
        extend_input_logprob_token_ids_gpu token_indices_to_pool lora_ids rids rids_int
        bootstrap_room_ids_int req_all_ids_flat req_all_ids_lens next_token_logits_buffer
        temperature top_p hidden_states residual model_specific_states _attn_output
    """,
    "parallel attention and two-batch overlap, which FairKV refuses": """
        original_global_num_tokens_cpu _original_batch_size _original_forward_mode
        _original_num_tokens global_num_tokens_cpu global_num_tokens_gpu
        global_num_tokens_for_logprob_cpu global_num_tokens_for_logprob_gpu dp_padding_mode
        dp_local_start_pos dp_local_num_tokens global_dp_buffer_len global_num_tokens_padded_cpu
        tbo_parent_token_range tbo_padded_len tbo_children attn_cp_metadata attn_dcp_metadata
        dcp_kv_mask
    """,
}
decode_part = partial(running_only, decode=ForwardMode.DECODE)
NOT_CUT = {name for fields in REASONS.values() for name in fields.split()}


def a_batch() -> ForwardBatch:
    """Every field that is cut holds its own positions 0, 1, 2, ...; lengths are real."""
    lengths, cached = [3, 10, 31, 12], [0, 6, 30, 11]
    values: dict[str, Any] = {
        name: list(range(REQUESTS)) if name.endswith("_cpu") else torch.arange(REQUESTS)
        for name in mixed.PER_REQUEST
    }
    values |= {name: torch.arange(TOKENS) for name in mixed.PER_TOKEN}
    values |= {
        "forward_mode": ForwardMode.MIXED,
        "batch_size": REQUESTS,
        "seq_lens": torch.tensor(lengths),
        "seq_lens_cpu": torch.tensor(lengths),
        "extend_prefix_lens": torch.tensor(cached),
        "extend_prefix_lens_cpu": cached,
        "seq_lens_sum": sum(lengths),
        "extend_num_tokens": TOKENS,
        "global_num_token_non_padded_cpu": TOKENS,
    }
    return ForwardBatch(**{name: value for name, value in values.items() if name in FIELDS})


def test_every_field_is_placed() -> None:
    """A field that SGLang adds must be looked at: does attention read it, request by request?"""
    cut = set(mixed.PER_REQUEST) | set(mixed.PER_TOKEN)
    assert not cut & NOT_CUT
    # Set by the parent class for multi-head attention over latents (DeepSeek).
    of_latents = ("mha_", "prefix_", "num_prefix", "attn_attend", "fused_prefix")
    unknown = {name for name in FIELDS - cut - NOT_CUT if not name.startswith(of_latents)}
    assert not unknown, f"cut these in attention/mixed.py or list them here: {sorted(unknown)}"


def listed(values: Any) -> list[int]:
    return values.tolist() if isinstance(values, torch.Tensor) else list(values)


@pytest.mark.parametrize(
    ("part", "requests", "tokens"),
    [(prompts_only, [0, 1], range(7)), (decode_part, [2, 3], range(7, 9))],
    ids=["prompts", "running"],
)
def test_both_parts_are_whole_batches(part: Any, requests: list[int], tokens: range) -> None:
    batch = a_batch()
    before = {name: getattr(batch, name) for name in FIELDS}
    cut = part(batch, SPANS)
    for name in set(mixed.PER_REQUEST) & FIELDS:
        assert listed(getattr(cut, name)) == [listed(before[name])[i] for i in requests], name
    for name in set(mixed.PER_TOKEN) & FIELDS:
        assert listed(getattr(cut, name)) == list(tokens), name
    assert cut.batch_size == len(requests)
    assert cut.seq_lens_sum == sum([3, 10, 31, 12][i] for i in requests)
    assert cut.global_num_token_non_padded_cpu == len(tokens)
    # The batch itself, which SGLang goes on to use, is as it was.
    assert all(getattr(batch, name) is value for name, value in before.items())


def test_modes_of_the_parts() -> None:
    prompts, running = prompts_only(a_batch(), SPANS), decode_part(a_batch(), SPANS)
    assert prompts.forward_mode.is_extend() and not prompts.forward_mode.is_decode()
    assert prompts.extend_num_tokens == 7
    assert running.forward_mode.is_decode() and not running.forward_mode.is_extend()
    assert running.req_pool_indices.tolist() == [2, 3]


@pytest.mark.parametrize("missing", ["seq_lens_cpu", "input_ids", "extend_start_loc"])
def test_what_is_not_there_stays_away(missing: str) -> None:
    batch = a_batch()
    setattr(batch, missing, None)
    cut = prompts_only(batch, SPANS)
    assert getattr(cut, missing) is None
    assert cut.seq_lens_sum == (13 if missing != "seq_lens_cpu" else 56)  # at least what is there


def test_fields_of_another_sglang_are_not_needed() -> None:
    """0.5.17 to 0.5.23 differ in fields; one that is missing is not made up."""
    newer = {"orig_seq_lens", "req_pool_indices_cpu", "out_cache_loc_virtual"}
    newer |= {"multi_item_delimiter_indices", "global_num_token_non_padded_cpu"}
    values = {name: value for name, value in vars(a_batch()).items() if name not in newer}
    cut = decode_part(SimpleNamespace(**values), SPANS)
    assert cut.seq_lens.tolist() == [31, 12] and cut.out_cache_loc.tolist() == [7, 8]
    assert not newer & set(vars(cut))
