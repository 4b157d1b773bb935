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

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
from msgspec.structs import replace
from tokenizers import AddedToken, Tokenizer

from minivlm.errors import UserError
from minivlm.inputs import tokenizer_file as form
from minivlm.inputs.token_settings import NamedToken, TokenSettings
from minivlm.schema import read_json, read_optional_json

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, without truncation and padding.

    Raises `UserError` if it is missing or broken, or consists of parts that tokenizers of LLaMA-like
    models do not have.
    """
    path = folder / "tokenizer.json"
    file = read_json(path, form.TokenizerFile)
    settings = TokenSettings.from_folder(folder)
    if _is_rebuilt(folder, file, settings):
        file = _rebuilt(file, settings)
    try:
        # Written anew, the file holds nothing but what was checked.
        tokenizer = Tokenizer.from_str(msgspec.json.encode(file).decode())
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"{path}: not a valid tokenizer ({' '.join(str(error).split())})") from None
    tokenizer.add_tokens(_tokens_to_add(settings, tokenizer))
    _check_white_space(folder, tokenizer)
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


def _check_white_space(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse added tokens that the library cannot tell apart: it aborts where two of them take the same space."""
    tokens = tokenizer.get_added_tokens_decoder().values()
    if not any(token.rstrip for token in tokens):
        return
    for token in tokens:
        found = tokenizer.normalizer.normalize_str(token.content) if tokenizer.normalizer else ""
        if token.content[:1].isspace() or found[:1].isspace():
            raise UserError(f"{folder}: the added token {token.content!r} begins with white space, others end in it")


class _ModelType(msgspec.Struct):
    model_type: str | None = None


def _is_rebuilt(folder: Path, file: form.TokenizerFile, settings: TokenSettings) -> bool:
    """Whether transformers would rebuild this tokenizer; the module's docstring says when."""
    if (settings.tokenizer_class or "").removesuffix("Fast") != "LlamaTokenizer":
        return False
    if read_optional_json(folder / "config.json", _ModelType).model_type in ("llava", "llava_next"):
        return False
    return not file.is_byte_level


def _rebuilt(file: form.TokenizerFile, settings: TokenSettings) -> form.TokenizerFile:
    """A `tokenizer.json`, changed as transformers' LlamaTokenizer changes it."""
    # Where a word boundary is put before a text that does not begin with a space.
    spaced = settings.add_prefix_space is not False
    scheme: Literal["never", "always", "first"] = "always" if settings.legacy else "first"
    if not spaced:
        scheme = "never"
    decoders: list[form.Decoder] = [
        form.Replace(pattern=form.String("▁"), content=" "),
        form.ByteFallback(),
        form.Fuse(),
    ]
    if spaced:
        decoders.append(form.Strip(content=" ", start=1, stop=0))
    return replace(
        file,
        added_tokens=file.added_tokens if settings.added_tokens_decoder is None else [],
        normalizer=None,
        pre_tokenizer=form.Metaspace(replacement="▁", prepend_scheme=scheme, split=False),
        decoder=form.Decoders(decoders=decoders),
        model=form.BPE(vocab=file.model.vocab, merges=file.model.merges, fuse_unk=True, byte_fallback=True),
    )


def _tokens_to_add(settings: TokenSettings, tokenizer: Tokenizer) -> list[AddedToken]:
    """The tokens of `added_tokens_decoder`, then named tokens that the tokenizer lacks.

    A token with a name (`bos_token`, `pad_token`, ...) is always special, whatever the entry that
    adds it says. The order of the result decides the ids of new tokens; it is that of transformers.
    """
    # 1) The named tokens, by their text.
    named = {token.content: token for token in settings.named.values()}
    # 2) The tokens that the settings list, in the order of their ids.
    entries = sorted((settings.added_tokens_decoder or {}).items())
    tokens = [_added(token, token.special or token.content in named) for _, token in entries]
    listed = {token.content for token in tokens}
    # 3) Tokens that the file has but does not mark as special, although they have a name.
    in_file = tokenizer.get_added_tokens_decoder().values()
    for token in in_file:
        if token.content in named and token.content not in listed and not token.special:
            token.special = True
            tokens.append(token)
    # 4) Named and additional tokens that are nowhere yet.
    known = listed | {token.content for token in in_file}
    missing = [*named.values(), *settings.additional]
    return tokens + [_added(token, True) for token in missing if token.content not in known]


def _added(token: NamedToken, special: bool) -> AddedToken:
    names = ("lstrip", "rstrip", "normalized", "single_word")
    flags = {name: getattr(token, name) for name in names if getattr(token, name) is not msgspec.UNSET}
    return AddedToken(token.content, special=special, **flags)
