"""Tokenizers as transformers 5 loads them, and decoding one token at a time.

A `tokenizer.json` is used as it is, with the tokens and special tokens that `tokenizer_config.json`
adds.

The exception is `tokenizer_class: LlamaTokenizer`. transformers rebuilds such a tokenizer from its
vocabulary and merges and ignores the file's normalizer, pre-tokenizer and decoder. This changes the
ids around `<image>`: there is, or is not, a word-boundary token before a line break. transformers
does *not* rebuild a byte-level tokenizer, nor one whose `config.json` says `llava` or `llava_next`,
because it lists these as models with a wrong tokenizer class on the hub.

BOS and EOS are added by the file's post-processor alone: `add_bos_token` in `tokenizer_config.json`
has no effect if there is a `tokenizer.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from minivlm.errors import UserError
from minivlm.schema import read_json_object

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def special_tokens(folder: Path) -> dict[str, str]:
    """The tokens that a checkpoint names: `bos_token`, `eos_token`, ..., and perhaps `image_token`."""
    settings = _token_settings(folder)
    named = {key: _content(value) for key, value in settings.items() if key.endswith("_token")}
    return {key: value for key, value in named.items() if value is not None}


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, without truncation and padding.

    Raises `UserError` if it is missing or broken.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file (expected a tokenizer in the `tokenizers` format)")
    settings = _token_settings(folder)
    try:
        if _is_rebuilt(path, settings):
            tokenizer = Tokenizer.from_str(json.dumps(_rebuilt(read_json_object(path), settings)))
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
    """Decodes tokens one at a time: each `put` returns the new characters, never half of one.

    All pieces together, with that of `end`, are the text that decoding all tokens at once would
    give. Each step decodes only a window of the last tokens, so that a long answer takes linear
    time. The window begins with tokens whose text was returned before; they make the decoder treat
    the new token as one in the middle of a text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._read = 0  # how many of the window's tokens are only there as context
        self._told = ""  # the text of those, which was returned before

    def put(self, token_id: int) -> str:
        """The characters that this token completes, often one word, sometimes none."""
        self._window.append(token_id)
        # Whether byte tokens form characters is known only when a run of them is over. Tokens that
        # show nothing by themselves (special tokens, a lone space) do not end such a run.
        is_byte = _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "")
        if is_byte or not self._decode([token_id]):
            return ""
        text = self._decode(self._window)
        if text.endswith("\ufffd"):  # the sign of a character whose other bytes are still to come
            return ""
        piece = text[len(self._told) :]
        # The tokens of this piece are the context of the next one.
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._told = self._decode(self._window)
        return piece

    def end(self) -> str:
        """The characters held back so far. Afterwards the streamer is ready for another text."""
        rest = self._decode(self._window)[len(self._told) :]
        self._window = []
        self._read = 0
        self._told = ""
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _token_settings(folder: Path) -> dict:
    """`tokenizer_config.json`; an old one is completed from `special_tokens_map.json`."""
    settings = read_json_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings.update(read_json_object(folder / "special_tokens_map.json"))
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, Mapping):  # named tokens, such as image_token
        settings.update(extra)
    return settings


def _is_rebuilt(path: Path, settings: Mapping) -> bool:
    """Whether transformers would rebuild this tokenizer; the module's docstring says when."""
    if str(settings.get("tokenizer_class")).removesuffix("Fast") != "LlamaTokenizer":
        return False
    if read_json_object(path.parent / "config.json").get("model_type") in ("llava", "llava_next"):
        return False
    raw = read_json_object(path)
    return '"ByteLevel"' not in json.dumps([raw.get("pre_tokenizer"), raw.get("decoder")])


def _rebuilt(raw: dict, settings: Mapping) -> dict:
    """A `tokenizer.json`, changed as transformers' LlamaTokenizer changes it."""
    model = raw["model"]
    # Where a word boundary is put before a text that does not begin with a space.
    spaced = settings.get("add_prefix_space") is not False
    if not spaced:
        scheme = "never"
    elif settings.get("legacy"):
        scheme = "always"
    else:
        scheme = "first"
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
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": scheme,
            "split": False,
        },
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
    """The tokens of `added_tokens_decoder`, then named tokens that the tokenizer lacks.

    A token with a name (`bos_token`, `pad_token`, ...) is always special, whatever the entry that
    adds it says. The order of the result decides the ids of new tokens; it is that of transformers.
    """
    # 1) The named tokens, by their text: the usual names first, then the checkpoint's own.
    named = {}
    own = [key for key in settings if key.endswith("_token") and key not in _NAMED]
    for key in (*_NAMED, *own):
        if _content(settings.get(key)) is not None:
            named[_content(settings[key])] = settings[key]
    # 2) The tokens that the settings list, in the order of their ids.
    entries = settings.get("added_tokens_decoder") or {}
    tokens = []
    for _, token in sorted(entries.items(), key=lambda entry: int(entry[0])):
        tokens.append(_added(token, token.get("special", False) or token["content"] in named))
    listed = {token.content for token in tokens}
    # 3) Tokens that the file has but does not mark as special, although they have a name.
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.content in named and token.content not in listed and not token.special:
            token.special = True
            tokens.append(token)
    # 4) Named and additional tokens that are nowhere yet.
    known = listed | {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    missing = [*named.values(), *(extra if isinstance(extra, list) else ())]
    return tokens + [_added(token, True) for token in missing if _content(token) not in known]


def _added(token: object, special: bool) -> AddedToken:
    """A token to add, from its text or from a dictionary with its flags."""
    given = token if isinstance(token, Mapping) else {}
    names = ("lstrip", "rstrip", "normalized", "single_word")
    flags = {name: given[name] for name in names if name in given}
    return AddedToken(_content(token), special=special, **flags)


def _content(token: object) -> str | None:
    """A token's text, whether it is written as a string or as the dictionary of an AddedToken."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
