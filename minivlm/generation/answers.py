"""Questions and answers: a request, an answer with its statistics, an answer as a stream of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from minivlm.cache import accounting
from minivlm.errors import UserError
from minivlm.generation.generate import Generation
from minivlm.generation.sampling import expect_integer
from minivlm.inputs.processor import Processor

ImageSource = str | Path | Image.Image


@dataclass(frozen=True)
class Request:
    """A question about images, not yet rendered.

    `<image>` in the prompt says where an image stands; without it the images come first. Raises `UserError` for a
    prompt that is no text and a sample number that is no integer.
    """

    prompt: str
    images: Sequence[ImageSource] = ()
    sample: int = 0  # its number: with the seed it decides all that is random about it

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise UserError(f"prompt is {self.prompt!r} (expected a text)")
        expect_integer("sample", self.sample)


@dataclass(frozen=True)
class Stats:
    """What a turn of a batch took; times and bytes are the whole batch's."""

    prefill_s: float  # images, vision tower, decoder and the first token
    decode_s: float
    decode_steps: int
    prompt_tokens: int  # of this turn, image tokens included
    vision_tokens: int
    new_tokens: int
    decoded_tokens: int  # new tokens that came from decode steps
    live_bytes: int  # KV entries held after prefill
    full_bytes: int  # what the full cache would hold then
    nbytes: int  # allocated for the cache: entries, room for the answer, bookkeeping
    live_entries: dict[str, int]  # after prefill by class, summed over sequences, layers and key/value heads
    entries_attended_per_step: dict[str, float]  # by class, mean over steps, sequences and layers, per head

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all sequences per second of decoding, without each one's first token, which comes from prefill."""
        return self.decoded_tokens / self.decode_s if self.decode_s else 0.0


@dataclass(frozen=True)
class Answer:
    text: str
    token_ids: list[int]  # an end-of-sequence id included
    finish: str  # "stop", or "length": max_new_tokens or the end of the context
    stats: Stats


class Stream:
    """The answer to one question: iterate over its text once, then read `.answer`.

    Stopping early leaves the answer as far as it came.
    """

    def __init__(self, processor: Processor, generation: Generation) -> None:
        self.processor, self.generation = processor, generation

    def stop(self) -> None:
        """End the answer after the token under way; what Ctrl-C should call."""
        self.generation.stop()

    def __iter__(self) -> Iterator[str]:
        streamer = self.processor.streamer()
        for (token,) in self.generation:
            if token is not None and (piece := streamer.put(token)):
                yield piece
        if piece := streamer.end():
            yield piece

    @property
    def answer(self) -> Answer:
        tokens = self.generation.tokens[0]
        return Answer(self.processor.decode(tokens), tokens, self.generation.finish[0], stats_of(self.generation))


def stats_of(generation: Generation) -> Stats:
    """What a finished turn took."""
    new = sum(len(tokens) for tokens in generation.tokens)
    return Stats(
        prefill_s=generation.prefill_s,
        decode_s=generation.decode_s,
        decode_steps=generation.cache.steps,
        prompt_tokens=generation.prompt_tokens,
        vision_tokens=generation.vision_tokens,
        new_tokens=new,
        decoded_tokens=new - len(generation.tokens),
        live_bytes=generation.live_bytes,
        full_bytes=generation.full_bytes,
        nbytes=generation.cache.nbytes,
        live_entries=generation.live_entries,
        entries_attended_per_step=accounting.entries_attended(generation.cache),
    )
