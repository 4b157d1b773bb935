"""The tokens that a checkpoint names, from `tokenizer_config.json` and `special_tokens_map.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from minivlm.schema import convert, read_optional_json

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Text = Annotated[str, Meta(max_length=256)]
Id = Annotated[int, Meta(ge=0, lt=1 << 24)]


class NamedToken(Struct, kw_only=True):
    """A token and how it is found in a text; what is unset, the `tokenizers` library decides."""

    content: Text
    special: bool = False
    lstrip: bool | UnsetType = UNSET
    rstrip: bool | UnsetType = UNSET
    normalized: bool | UnsetType = UNSET
    single_word: bool | UnsetType = UNSET


_Token: Any = Text | NamedToken | None
_Tokens = Annotated[list[Text | NamedToken], Meta(max_length=1 << 14)]


class _File(Struct, kw_only=True):
    """`tokenizer_config.json`, without the tokens that have keys of their own."""

    tokenizer_class: str | None = None
    legacy: bool | None = None
    add_prefix_space: bool | None = None
    added_tokens_decoder: Annotated[dict[Id, NamedToken], Meta(max_length=1 << 14)] | None = None
    extra_special_tokens: _Tokens | dict[str, Text | NamedToken] | None = None
    additional_special_tokens: _Tokens | None = None


@dataclass(frozen=True)
class TokenSettings:
    """What is read of both files."""

    tokenizer_class: str | None
    legacy: bool | None
    add_prefix_space: bool | None
    named: dict[str, NamedToken]  # `bos_token`, ..., and the checkpoint's own, such as `image_token`
    added_tokens_decoder: dict[int, NamedToken] | None  # by id
    additional: list[NamedToken]

    @classmethod
    def from_folder(cls, folder: Path) -> TokenSettings:
        """Read `tokenizer_config.json`; an old one is completed from `special_tokens_map.json`.

        Raises `UserError`, naming the key, for one that is malformed.
        """
        path = folder / "tokenizer_config.json"
        raw = read_optional_json(path, dict[str, Any])
        if raw.get("added_tokens_decoder") is None:
            raw.update(read_optional_json(folder / "special_tokens_map.json", dict[str, Any]))
        file = convert(raw, _File, str(path))
        extra = file.extra_special_tokens
        if isinstance(extra, dict):  # named tokens, such as image_token
            raw.update({key: raw["extra_special_tokens"][key] for key in extra if key.endswith("_token")})
        listed = extra or file.additional_special_tokens or []
        return cls(
            tokenizer_class=file.tokenizer_class,
            legacy=file.legacy,
            add_prefix_space=file.add_prefix_space,
            named=_named(raw, str(path)),
            added_tokens_decoder=file.added_tokens_decoder,
            additional=[_token(token) for token in listed] if isinstance(listed, list) else [],
        )

    @property
    def texts(self) -> dict[str, str]:
        """The text of each named token."""
        return {key: token.content for key, token in self.named.items()}


def _named(raw: Mapping[str, Any], name: str) -> dict[str, NamedToken]:
    """The usual names first, then the checkpoint's own, in the order of transformers."""
    own = [key for key, value in raw.items() if key.endswith("_token") and isinstance(value, (str, Mapping))]
    keys = dict.fromkeys((*_NAMED, *own))
    tokens = {key: convert(raw.get(key), _Token, name, key) for key in keys}
    return {key: _token(token) for key, token in tokens.items() if token is not None}


def _token(token: str | NamedToken) -> NamedToken:
    return NamedToken(content=token) if isinstance(token, str) else token
