"""The form of a `tokenizer.json` that is given to the `tokenizers` library.

That library takes a file's word for everything: a pattern that backtracks or a chain of replacements
hangs it, and many other settings make it abort in the middle of a text. So it sees only what is
written here, the parts that the tokenizers of LLaMA-like models consist of. Each is harmless with
any text: no part makes a text longer than in proportion, and all of them take time in proportion to
its length. The reference for the parts is https://huggingface.co/docs/tokenizers/components.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

Piece = Annotated[str, Meta(max_length=1024)]  # a token of a vocabulary; the longest of known ones is 128 spaces
Id = Annotated[int, Meta(ge=0, lt=1 << 24)]
Text = Annotated[str, Meta(max_length=256)]
Nothing = Annotated[str, Meta(max_length=0)]
# The alternatives of the patterns with which GPT-2, Llama 3, Qwen and Mistral split words. None of them backtracks
# further than over one run of characters.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_ALTERNATIVES = {
    *_CONTRACTIONS.split("|"),
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
    r" ?\p{L}+",
    r"\p{N}",
    r"\p{N}+",
    r"\p{N}{1,3}",
    r" ?\p{N}+",
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
}


class Part(Struct, omit_defaults=True, kw_only=True, tag_field="type"):
    """A part of a tokenizer; its `type` says which. What a file leaves out, the library decides."""


class String(Struct, forbid_unknown_fields=True, rename={"text": "String"}):
    """A text as a pattern."""

    text: Annotated[str, Meta(min_length=1, max_length=256)]


class SplitPattern(Struct, omit_defaults=True, kw_only=True, rename={"text": "String", "regex": "Regex"}):
    """A text or a regular expression as a pattern."""

    text: Annotated[str, Meta(min_length=1, max_length=256)] | UnsetType = UNSET
    regex: str | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.regex is UNSET:
            return
        alternatives = self.regex.replace(f"(?i:{_CONTRACTIONS})", _CONTRACTIONS).split("|")
        if not set(alternatives) <= _ALTERNATIVES:
            raise ValueError("Regex is none of those of GPT-2, Llama 3, Qwen and Mistral")


# Normalizers


class Prepend(Part, tag="Prepend"):
    prepend: Annotated[str, Meta(min_length=1, max_length=256)]


class Replace(Part, tag="Replace"):
    """Also a decoder."""

    pattern: String
    content: Text

    def __post_init__(self) -> None:
        if not 1 <= len(self.content) <= len(self.pattern.text):
            raise ValueError("content has more characters than String, or none")


class NFC(Part, tag="NFC"):
    pass


class NFD(Part, tag="NFD"):
    pass


class NFKC(Part, tag="NFKC"):
    pass


class NFKD(Part, tag="NFKD"):
    pass


class Lowercase(Part, tag="Lowercase"):
    pass


Normalizer = Prepend | Replace | NFC | NFD | NFKC | NFKD | Lowercase


class Normalizers(Part, tag="Sequence"):
    normalizers: Annotated[list[Normalizer], Meta(max_length=8)]


# Pre-tokenizers


class Metaspace(Part, tag="Metaspace"):
    """Also a decoder."""

    replacement: Annotated[str, Meta(min_length=1, max_length=1)]
    prepend_scheme: Literal["always", "never", "first"] | UnsetType = UNSET
    add_prefix_space: bool | UnsetType = UNSET
    split: bool | UnsetType = UNSET


class ByteLevel(Part, tag="ByteLevel"):
    """Also a decoder and a post-processor."""

    add_prefix_space: bool
    trim_offsets: bool
    use_regex: bool | UnsetType = UNSET


class Split(Part, tag="Split"):
    pattern: SplitPattern
    behavior: Literal["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
    invert: bool


class Digits(Part, tag="Digits"):
    individual_digits: bool


PreTokenizer = Metaspace | ByteLevel | Split | Digits


class PreTokenizers(Part, tag="Sequence"):
    pretokenizers: Annotated[list[PreTokenizer], Meta(max_length=8)]


# Decoders


class ByteFallback(Part, tag="ByteFallback"):
    pass


class Fuse(Part, tag="Fuse"):
    pass


class Strip(Part, tag="Strip"):
    """Characters cut off a token's left side; the library fails at tokens that are cut from both."""

    content: Annotated[str, Meta(min_length=1, max_length=1)]
    start: Annotated[int, Meta(ge=0, le=256)]
    stop: Annotated[int, Meta(ge=0, le=0)]


Decoder = Replace | Metaspace | ByteLevel | ByteFallback | Fuse | Strip


class Decoders(Part, tag="Sequence"):
    decoders: Annotated[list[Decoder], Meta(max_length=8)]


# Post-processors


class TemplateToken(Struct):
    """A token that a template writes, which may stand for several ids."""

    id: str
    ids: Annotated[list[Id], Meta(max_length=16)]
    tokens: Annotated[list[Text], Meta(max_length=16)]


class TokenPlace(Struct):
    id: str
    type_id: Id


class TextPlace(Struct):
    id: Literal["A", "B"]
    type_id: Id


class TemplatePiece(Struct, omit_defaults=True, kw_only=True, rename={"token": "SpecialToken", "text": "Sequence"}):
    token: TokenPlace | UnsetType = UNSET
    text: TextPlace | UnsetType = UNSET


class Template(Part, tag="TemplateProcessing"):
    """Tokens around a text; `pair`, for two texts, is never used."""

    single: Annotated[list[TemplatePiece], Meta(max_length=16)]
    pair: Annotated[list[TemplatePiece], Meta(max_length=16)]
    special_tokens: dict[str, TemplateToken]

    def __post_init__(self) -> None:
        if [piece.text.id for piece in self.single if piece.text is not UNSET] != ["A"]:
            raise ValueError("single does not have Sequence A once")
        for piece in self.single:
            if piece.token is not UNSET and piece.token.id not in self.special_tokens:
                raise ValueError(f"special_tokens lacks a token of single, {piece.token.id[:64]!r}")


PostProcessor = Template | ByteLevel


class PostProcessors(Part, tag="Sequence"):
    processors: Annotated[list[PostProcessor], Meta(max_length=8)]

    def __post_init__(self) -> None:
        if sum(isinstance(each, Template) for each in self.processors) > 1:
            raise ValueError("processors has TemplateProcessing more than once")


# The model and the whole


class BPE(Part, tag="BPE"):
    """Byte-pair encoding."""

    vocab: Annotated[dict[Piece, Id], Meta(max_length=1 << 20)]
    merges: Annotated[list[str | tuple[str, str]], Meta(max_length=1 << 21)]
    unk_token: str | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False
    # Merges that are left out at random, and marks on the pieces of a word.
    dropout: Annotated[float, Meta(ge=0, le=0)] | None = None
    continuing_subword_prefix: Nothing | None = None
    end_of_word_suffix: Nothing | None = None

    def __post_init__(self) -> None:
        if len(set(self.vocab.values())) != len(self.vocab):
            raise ValueError("vocab gives the same id to several tokens")
        if self.unk_token is not None and self.unk_token not in self.vocab:
            raise ValueError("unk_token is not in vocab")


class FileToken(Struct):
    """A token that is found in a text before anything else."""

    id: Id
    content: Text
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


class TokenizerFile(Struct, kw_only=True):
    version: Literal["1.0"] = "1.0"
    added_tokens: Annotated[list[FileToken], Meta(max_length=1 << 14)] = []
    normalizer: Normalizer | Normalizers | None = None
    pre_tokenizer: PreTokenizer | PreTokenizers | None = None
    post_processor: PostProcessor | PostProcessors | None = None
    decoder: Decoder | Decoders | None = None
    model: BPE

    @property
    def is_byte_level(self) -> bool:
        """Whether the pre-tokenizer or the decoder works on bytes."""
        parts: list[object] = []
        for part in (self.pre_tokenizer, self.decoder):
            if isinstance(part, PreTokenizers):
                parts += part.pretokenizers
            elif isinstance(part, Decoders):
                parts += part.decoders
            else:
                parts.append(part)
        return any(isinstance(part, ByteLevel) for part in parts)
