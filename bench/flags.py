# SPDX-License-Identifier: Apache-2.0
"""Settings whose fields are the flags: name, text and default stand in one place."""

from __future__ import annotations

from argparse import Namespace, _ActionsContainer
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fairkv_sglang.model import PRESETS, Model

ATTENTION_ONLY = "attention-only"
MODELS = {
    "qwen3-0.6b": replace(PRESETS["qwen3-0.6b"], vocab_size=8192),
    # Hidden size, MLP and vocabulary so small that a decode step is little but attention.
    ATTENTION_ONLY: Model(ATTENTION_ONLY, 4, 32, 8, 128, 64, 128, 512),
    **{name: model for name, model in PRESETS.items() if name != "qwen3-0.6b"},
}
"""Models of random weights; the vocabulary of qwen3-0.6b is cut, see :func:`proportions`."""
KEYS = {
    "layers": "num_layers", "kv_heads": "num_kv_heads", "group": "group", "head_dim": "head_dim",
    "hidden": "hidden_size", "mlp": "intermediate_size", "vocab": "vocab_size",
}  # fmt: skip


def parse_model(text: Any) -> Any:
    """A model from ``"qwen3-0.6b"`` or ``"attention-only,group=1,layers=2"``."""
    if not isinstance(text, str):
        return text
    name, *pairs = (part.strip() for part in text.split(","))
    if name not in MODELS:
        raise ValueError(f"{name!r} is not one of {', '.join(MODELS)}")
    changes: dict[str, Any] = {}
    for key, _, value in (pair.partition("=") for pair in pairs):
        if key not in KEYS or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"{key}={value}: give {', '.join(KEYS)} a whole number")
        changes[KEYS[key]] = int(value)
    model = MODELS[name]
    group = changes.pop("group", model.group_size)
    heads = changes.get("num_kv_heads", model.num_kv_heads)
    return replace(model, name=text, num_q_heads=heads * group, **changes)


def proportions(model: Model) -> str:
    """Name and sizes of a model, for titles."""
    cut, vocab = PRESETS.get(model.name), f"vocabulary {model.vocab_size:,}"
    if cut is not None and cut.vocab_size != model.vocab_size:
        vocab += f" (of {cut.vocab_size:,})"
    return (
        f"{model.name}: {model.num_layers} layers, {model.num_kv_heads} KV heads of "
        f"{model.head_dim}, group {model.group_size}, hidden {model.hidden_size:,}, "
        f"MLP {model.intermediate_size:,}, {vocab}"
    )


def split(text: Any) -> Any:
    """``"a,b"`` in parts."""
    return [part.strip() for part in text.split(",")] if isinstance(text, str) else text


Ints = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(split)]
Names = Annotated[tuple[str, ...], BeforeValidator(split)]
Chosen = tuple[str, ...]
AnyModel = Annotated[Model, BeforeValidator(parse_model)]


class Settings(BaseModel):
    """Fields with a description are flags of the same name."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def add_flags(cls, parser: _ActionsContainer) -> None:
        """Add the flags that the parser does not have yet; values stay text."""
        for name, field in cls.model_fields.items():
            flag = "--" + name.replace("_", "-")
            if flag in parser._option_string_actions:
                continue
            shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else None
            shown = shown or getattr(field.default, "name", field.default)
            default = "" if shown in (None, {}) else f" (default {shown})"
            parser.add_argument(flag, metavar="V", help=f"{field.description}{default}")

    @classmethod
    def of(cls, flags: Namespace) -> Self:
        """From parsed flags.

        Raises:
            ValueError: in one line, naming the flag.
        """
        given = {name: getattr(flags, name, None) for name in cls.model_fields}
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            first = error.errors()[0]
            said = first["msg"].removeprefix("Value error, ")
            if not first["loc"]:  # about more than one flag
                raise ValueError(said) from None
            name = "--" + str(first["loc"][0]).replace("_", "-")
            raise ValueError(f"{name}: {said}, got {first['input']!r}") from None

    def portable(self) -> dict[str, Any]:
        """For a result file; of paths the last three parts, no more goes out."""
        values = self.model_dump(mode="json")
        for key in ("profile", "model_path"):
            if values.get(key):
                values[key] = shortened(Path(values[key]))
        return values


def shortened(path: Path) -> str:
    """The last three parts."""
    return "/".join(path.parts[-3:])


def known(chosen: Chosen, names: Chosen, every: Chosen) -> Chosen:
    """The chosen names, each once; ``all`` stands for ``every``.

    Raises:
        ValueError: in one line, for another name.
    """
    if chosen == ("all",):
        return every
    for name in chosen:
        if name not in names:
            raise ValueError(f"{name!r} is not one of {', '.join(names)} (or all)")
    return tuple(dict.fromkeys(chosen))
