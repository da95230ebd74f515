# SPDX-License-Identifier: Apache-2.0
"""Write a trained demo model as a Hugging Face folder: configuration, weights and tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.model import RecallModel
from demo.vocabulary import (
    BOS,
    BOS_ID,
    EOS,
    EOS_ID,
    ID_OF,
    PAD,
    PAD_ID,
    SPECIALS,
    UNK,
)

#: The model knows no roles: a chat is the text of its messages.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def build_tokenizer(max_positions: int) -> PreTrainedTokenizerFast:
    """The word-level tokenizer; the same every time.

    Text is lower-cased and cut into words, numbers of one or two digits and single marks, so
    that "Anna: 4712" is read as "anna : 47 12".  What the vocabulary lacks becomes ``<unk>``.
    No ``<s>`` is put in front: the tokens of a text are its words and nothing else.
    """
    tokenizer = Tokenizer(models.WordLevel(ID_OF, unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[0-9]{1,2}|\p{L}+|[^0-9\p{L}]"), behavior="isolated"),
        ]
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(model: RecallModel) -> LlamaConfig:
    """The model's dimensions as a Llama configuration."""
    size = model.size
    return LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.mlp_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.query_heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.max_positions,
        rms_norm_eps=size.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        hidden_act="silu",
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        dtype="bfloat16",
    )


def export_model(model: RecallModel, folder: Path) -> None:
    """Write ``model`` to ``folder`` with its weights rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    exported = LlamaForCausalLM(build_config(model))
    missing = exported.load_state_dict(model.to_hf_state(), strict=False)
    if missing.unexpected_keys or missing.missing_keys not in ([], ["lm_head.weight"]):
        raise RuntimeError(f"the weights do not fit Llama: {missing}")
    exported.tie_weights()
    exported.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID
    )
    exported.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer(model.size.max_positions).save_pretrained(folder)
