"""From a prompt to tokens: prefill, the decode loop, sampling.

A `Generation` is one turn of a batch: created, it has prefilled; iterated, it yields the tokens of one step after
another, and on a GPU the host reads a token while the next step already runs.  It never sees text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minivlm.cache.buffers import reselect
from minivlm.cache.kv_cache import CLASSES, KVCache
from minivlm.cache.recorder import Observer
from minivlm.errors import UserError
from minivlm.model.llava import Llava

PREFILL_TOKENS = 32768  # tokens, padding included, that go through a layer at once


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy.  Raises `UserError` for values out of range."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens} (expected at least 1)")
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature} (expected 0 or more)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p} (expected a share above 0, up to 1)")


def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token id per row of logits [B, V]; each row draws from its own generator, without waiting for the device."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    # The largest becomes 0 before the division, so that no temperature is too small.
    probabilities = ((logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(dim=-1) - ordered >= sampling.top_p] = 0  # the token that crosses top_p stays
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    # argmax(p / e) with e exponentially distributed draws from p.
    noise = torch.stack([torch.empty_like(p).exponential_(generator=g) for p, g in zip(probabilities, generators)])
    return (probabilities / noise).argmax(dim=-1)


@torch.no_grad()
def prefill_step(
    model: Llava,
    cache: KVCache,
    input_ids: Sequence[Tensor],
    features: Sequence[Tensor],
    max_new_tokens: int,
    observer: Observer | None = None,
) -> Tensor:
    """Prefill the new tokens [S_b] of each sequence, with the features of all their images, and return logits [B, V].

    As many sequences go through the layers at once as make up `PREFILL_TOKENS`, which bounds the activations.
    """
    device = model.lm_head.weight.device
    is_vision = [ids.cpu() == model.config.image_token_index for ids in input_ids]
    rows_at_once = max(1, PREFILL_TOKENS // max(len(ids) for ids in input_ids))
    embeds = model.embed(pad_sequence(list(input_ids), batch_first=True).to(device), features)
    passes = cache.prefill(is_vision, max_new_tokens, rows_at_once)
    logits = []
    for run in passes:
        positions = pad_sequence(
            [torch.arange(len(turn.is_vision)) + turn.start for turn in run.turns], batch_first=True
        )
        hidden = model(embeds[run.span.start : run.span.stop, : positions.shape[1]], positions.to(device), run)
        last = torch.tensor(run.lengths, device=device) - 1
        logits.append(model.lm_head(hidden[torch.arange(len(last), device=device), last]))
    if observer is not None:
        observer.prefilled(cache, passes[0])
    return torch.cat(logits)


def forward_step(model: Llava, cache: KVCache, kind: str, token: Tensor, stop: Tensor) -> Tensor:
    """A decode step without the choice of cores; to be compiled once per `kind` of step.

    A sequence that is at its end, by one of the `stop` ids or by the model's context, stores nothing any more.
    """
    position = cache.position
    cache.active.logical_and_(~torch.isin(token, stop) & (position[:, 0] < cache.config.context_length))
    hidden = model(model.language_model.embed_tokens(token[:, None]), position, cache.decode(kind))
    cache.fed.add_(cache.active)
    return model.lm_head(hidden[:, 0])


def decode_step(
    model: Llava,
    cache: KVCache,
    kind: str,
    token: Tensor,
    stop: Tensor,
    forward: Callable = forward_step,
    choose: Callable = reselect,
) -> Tensor:
    """Feed one token [B] per sequence and return the next logits [B, V]; a refresh then re-chooses the cores.

    The caller closes the step with `cache.advance(kind)`.  `forward` and `choose` may be compiled.
    """
    logits = forward(model, cache, kind, token, stop)
    if kind == "refresh":
        choose(cache.layers, cache.active)
    return logits


def _to_host(token: Tensor) -> Callable[[], list[int]]:
    """Start copying ids [B] to the host; the returned function waits for them, but not for what is launched later."""
    if not token.is_cuda:
        return token.tolist
    host = torch.empty(token.shape, dtype=token.dtype, pin_memory=True).copy_(token, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[int]:
        arrived.synchronize()
        return host.tolist()

    return wait


class Generation:
    """One turn: `input_ids` are the new tokens [S_b] of each sequence, `features` those of all their images, in order.

    The prefill's time counts from `started` (`time.perf_counter`), for work done on the images before.  `step` is
    `decode_step` or the same compiled, for which the cache has to be static.  Raises `UserError`
    if the new tokens do not fit the model's context.
    """

    def __init__(
        self,
        model: Llava,
        cache: KVCache,
        input_ids: Sequence[Tensor],
        features: Sequence[Tensor],
        sampling: Sampling,
        observer: Observer | None = None,
        started: float | None = None,
        step: Callable[[Llava, KVCache, str, Tensor, Tensor], Tensor] = decode_step,
    ) -> None:
        self.model, self.cache, self.sampling, self.observer, self._decode_step = model, cache, sampling, observer, step
        device = model.lm_head.weight.device
        self.tokens: list[list[int]] = [[] for _ in input_ids]  # per sequence, an end-of-sequence id included
        self.finish = ["length"] * len(input_ids)
        self.decode_s = 0.0
        self.stopped = False  # by `stop`
        self.intact = True  # whether all layers of the cache hold the same tokens: not after an exception within a step
        stop = () if sampling.ignore_eos else model.config.eos_token_ids
        self._stop = torch.tensor(stop, dtype=torch.int64, device=device)
        seeds = [(sampling.seed * 1_000_003 + track.sample) % 2**63 for track in cache.tracks]
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        started = time.perf_counter() if started is None else started
        self._first = choose(
            prefill_step(model, cache, input_ids, features, sampling.max_new_tokens, observer),
            sampling,
            self._generators,
        )
        self._first.tolist()  # waits for the device
        self.prefill_s = time.perf_counter() - started
        self.prompt_tokens = sum(len(ids) for ids in input_ids)
        self.vision_tokens = sum(len(rows) for rows in features)
        self.live_bytes, self.full_bytes = cache.live_bytes(), cache.full_bytes()
        by_layer = cache.live_entries()
        self.live_entries = {name: sum(held[name] for held in by_layer) for name in CLASSES}

    def stop(self) -> None:
        """End the answer after the step under way; may be called from a signal handler."""
        self.stopped = True

    def _step(self, token: Tensor) -> Tensor:
        self.intact, kind = False, self.cache.kind
        logits = self._decode_step(self.model, self.cache, kind, token, self._stop)
        self.cache.advance(kind)
        if self.observer is not None:
            self.observer.stepped(self.cache, kind)
        self.intact = True
        return choose(logits, self.sampling, self._generators)

    @torch.no_grad()
    def __iter__(self) -> Iterator[list[int | None]]:
        """Yields each step's token per sequence, None for one that has finished."""
        token, ahead = self._first, self._first.is_cuda
        room = [self.cache.config.context_length - track.seen + 1 for track in self.cache.tracks]
        finished = [False] * len(room)
        for step in range(self.sampling.max_new_tokens):
            started = time.perf_counter()
            # On a GPU the next step is under way before the host reads this one's token; on a CPU that would only delay it.
            arriving = _to_host(token)
            following = self._step(token) if ahead and self.cache.steps < self.cache.max_steps else None
            new: list[int | None] = [None if over else value for over, value in zip(finished, arriving())]
            for b, value in enumerate(new):
                if value is not None:
                    self.tokens[b].append(value)
                    stopped = not self.sampling.ignore_eos and value in self.model.config.eos_token_ids
                    self.finish[b] = "stop" if stopped else "length"
                    finished[b] = stopped or step + 1 >= room[b]
            self.decode_s += time.perf_counter() - started
            yield new
            if self.stopped or all(finished) or step + 1 == self.sampling.max_new_tokens:
                return
            started = time.perf_counter()
            token = self._step(token) if following is None else following
            self.decode_s += time.perf_counter() - started

    def unfed(self, b: int) -> list[int]:
        """The generated tokens that the cache does not hold: the last one, or none after an interruption."""
        return self.tokens[b][int(self.cache.fed[b]) :]
