"""Tokenizers as transformers 5 loads them, and decoding one token at a time.

`tokenizer.json` is kept as it is, with the tokens and special tokens that `tokenizer_config.json` adds.
The exception is `tokenizer_class: LlamaTokenizer`: transformers rebuilds such a tokenizer from its
vocabulary and merges and ignores the file's normalizer, pre-tokenizer and decoder, which changes the
ids around `<image>` (an extra word-boundary token before a line break, or none).  It does *not* do so
for a byte-level file, nor where the `config.json` beside it says `llava` or `llava_next`, because it
lists those as models whose tokenizer class is wrong on the hub.  BOS and EOS come from the file's
post-processor alone: `add_bos_token` of `tokenizer_config.json` has no effect beside a `tokenizer.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from minivlm.errors import UserError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def read_json(path: Path) -> dict:
    """The object in a JSON file, empty if there is no such file; raises `UserError` for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__} (expected an object)")
    return found


def special_tokens(folder: Path) -> dict[str, str]:
    """The tokens a checkpoint names (`bos_token`, `eos_token`, ..., also its own, such as `image_token`)."""
    named = {key: _content(value) for key, value in _token_settings(folder).items() if key.endswith("_token")}
    return {key: value for key, value in named.items() if value is not None}


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, without truncation and padding; raises `UserError` if it is missing or broken."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file (expected a tokenizer in the `tokenizers` format)")
    settings = _token_settings(folder)
    try:
        if _is_rebuilt(path, settings):
            tokenizer = Tokenizer.from_str(json.dumps(_rebuilt(read_json(path), settings)))
        else:
            tokenizer = Tokenizer.from_file(str(path))
    except UserError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{path}: not a valid tokenizer ({' '.join(str(error).split())})") from None
    try:
        tokenizer.add_tokens(_tokens_to_add(settings, tokenizer))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: its added or special tokens are malformed ({error!r})"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Streamer:
    """Text as it grows: `put` a token, get the new characters, never half of one.

    The pieces, with that of `end`, add up to the decoding of all tokens at once.  Only a window of tokens
    is decoded at each step; it begins early enough for the decoder to treat the new token as one in mid-text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._told = ""  # the text of the window's first `_read` tokens, all of it put out
        self._read = 0

    def put(self, token_id: int) -> str:
        """The characters that this token completes, often one word, sometimes none."""
        self._window.append(int(token_id))
        # Whether byte tokens form characters is settled only when a run of them is over, and tokens that
        # show nothing by themselves (special ones, a lone space) do not end it.
        if _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(int(token_id)) or "") or not self._decode([int(token_id)]):
            return ""
        text = self._decode(self._window)
        if text.endswith("\ufffd"):  # a character cut in two looks like this
            return ""
        piece = text[len(self._told) :]
        self._window = self._window[self._read :]  # the new tokens alone can anchor the next step
        self._told, self._read = self._decode(self._window), len(self._window)
        return piece

    def end(self) -> str:
        """What was held back; after it the streamer is ready for another text."""
        rest = self._decode(self._window)[len(self._told) :]
        self._window, self._told, self._read = [], "", 0
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _token_settings(folder: Path) -> dict:
    """`tokenizer_config.json`, completed as transformers completes old ones from `special_tokens_map.json`."""
    settings = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings.update(read_json(folder / "special_tokens_map.json"))
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, Mapping):  # named ones, such as image_token
        settings.update(extra)
    return settings


def _is_rebuilt(path: Path, settings: Mapping) -> bool:
    if str(settings.get("tokenizer_class")).removesuffix("Fast") != "LlamaTokenizer":
        return False
    if read_json(path.parent / "config.json").get("model_type") in ("llava", "llava_next"):
        return False
    raw = read_json(path)
    return '"ByteLevel"' not in json.dumps([raw.get("pre_tokenizer"), raw.get("decoder")])


def _rebuilt(raw: dict, settings: Mapping) -> dict:
    """The tokenizer that transformers' LlamaTokenizer makes of a `tokenizer.json`."""
    model = raw["model"]
    spaced = settings.get("add_prefix_space") is not False
    scheme = ("always" if settings.get("legacy") else "first") if spaced else "never"
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if spaced:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        **raw,
        "added_tokens": [] if "added_tokens_decoder" in settings else raw["added_tokens"],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": model["vocab"],
            "merges": model["merges"],
        },
    }


def _tokens_to_add(settings: Mapping, tokenizer: Tokenizer) -> list[AddedToken]:
    """Tokens of `added_tokens_decoder` in id order, then those that the settings name and the tokenizer lacks.

    A token that is named (`bos_token`, `pad_token`, ...) is a special one, whatever the entry says that adds it.
    """
    named = {}
    for key in (*_NAMED, *(key for key in settings if key.endswith("_token") and key not in _NAMED)):
        if _content(settings.get(key)) is not None:
            named[_content(settings[key])] = settings[key]
    entries = sorted((settings.get("added_tokens_decoder") or {}).items(), key=lambda entry: int(entry[0]))
    tokens = [_added(token, token.get("special", False) or token["content"] in named) for _, token in entries]
    mine = {token.content for token in tokens}
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.content in named and token.content not in mine and not token.special:
            token.special = True
            tokens.append(token)
    known = mine | {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    missing = [*named.values(), *(extra if isinstance(extra, list) else ())]
    return tokens + [_added(token, True) for token in missing if _content(token) not in known]


def _added(token: object, special: bool) -> AddedToken:
    flags = token if isinstance(token, Mapping) else {}
    flags = {key: flags[key] for key in ("lstrip", "rstrip", "normalized", "single_word") if key in flags}
    return AddedToken(_content(token), special=special, **flags)


def _content(token: object) -> str | None:
    """A token's text, written as a string or as the dictionary of an AddedToken."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
