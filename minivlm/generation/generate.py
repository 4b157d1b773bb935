"""One turn of a batch: prefill, then the loop of decode steps.

A `Generation` has prefilled once it is created; iterated, it yields the tokens of one step after another. On a GPU the
host reads a token while the next step already runs. It never sees text.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from minivlm.cache import accounting
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.recorder import Observer
from minivlm.errors import UserError
from minivlm.generation.sampling import NOT_FINITE, Sampling, checked, choose_token
from minivlm.generation.steps import DecodeStep, decode_step, prefill_step
from minivlm.model.llava import Llava
from minivlm.transfer import to_device


def _unexplained(tokens: Sequence[Sequence[int]]) -> UserError:
    return UserError("the model's numbers are not finite")


class Generation:
    """One turn: `input_ids` are the new tokens [S] of each sequence, `features` those of all their images, in order.

    is_vision holds a bool tensor [S] per sequence, which says where image tokens stand; None: wherever the id is the
    image token's. The prefill's time counts from `started` (`time.perf_counter`), for work done on the images before.
    `step` is `decode_step`, or the same compiled, for which the cache has to be static. Raises `UserError` if the new
    tokens do not fit the model's context, and, here or while it is iterated, the error of `explain` if logits or
    features are not finite: `explain` is called with the tokens so far of each sequence.
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
        step: DecodeStep = decode_step,
        is_vision: Sequence[Tensor] | None = None,
        explain: Callable[[Sequence[Sequence[int]]], UserError] = _unexplained,
    ) -> None:
        self.model, self.cache, self.sampling = model, cache, sampling
        self.observer = observer
        self._decode_step, self._explain = step, explain
        self.tokens: list[list[int]] = [[] for _ in input_ids]  # per sequence, an end-of-sequence id included
        self.finish = ["length"] * len(input_ids)
        self.decode_s = 0.0
        self.stopped = False  # by `stop`
        # Whether all layers of the cache hold the same tokens, and numbers: not after an exception within a step.
        self.intact = True

        device = model.lm_head.weight.device
        stop = () if sampling.ignore_eos else model.config.eos_token_ids
        self._stop = to_device(torch.tensor(stop, dtype=torch.int64), device)
        seeds = [(sampling.seed * 1_000_003 + sequence.sample) % 2**63 for sequence in cache.sequences]
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

        started = time.perf_counter() if started is None else started
        logits = prefill_step(model, cache, input_ids, features, sampling.max_new_tokens, observer, is_vision)
        self._first = self._choose(logits)
        told = self._first[1]
        for image in features:  # a policy may have dropped all that would show in the logits
            told = checked(told, image.flatten())
        self._tail_vision = accounting.vision_in_tail(cache, [0] * len(input_ids))
        if NOT_FINITE in told.tolist():  # waits for the device
            raise explain(self.tokens)
        self.prefill_s = time.perf_counter() - started
        self.prompt_tokens = sum(len(ids) for ids in input_ids)
        self.vision_tokens = sum(len(image) for image in features)

    # What the cache held after the prefill. It is counted when someone asks, not before the first token; after the
    # cache's next turn began, it is too late to ask.

    @functools.cached_property
    def live_entries(self) -> dict[str, int]:
        """Entries by class, summed over sequences, layers and key/value heads."""
        by_layer = accounting.live_entries(self.cache, [0] * len(self.tokens), self._tail_vision)
        return {name: sum(layer[name] for layer in by_layer) for name in accounting.ENTRY_CLASSES}

    @property
    def live_bytes(self) -> int:
        """Bytes of these entries."""
        heads = self.cache.config.num_key_value_heads
        return sum(self.live_entries.values()) * accounting.entry_bytes(self.cache) // heads

    @property
    def full_bytes(self) -> int:
        """Bytes that the full cache would have held."""
        return accounting.full_bytes(self.cache, [0] * len(self.tokens))

    def stop(self) -> None:
        """End the answer after the step under way; may be called from a signal handler."""
        self.stopped = True

    def unfed(self, row: int) -> list[int]:
        """The generated tokens that the cache does not hold: the last one, or none after an interruption."""
        return self.tokens[row][int(self.cache.stored[row]) :]

    @torch.no_grad()
    def __iter__(self) -> Iterator[list[int | None]]:
        """Yields each step's token per sequence, None for one that has finished."""
        token, told = self._first
        ahead = token.is_cuda
        room = [self.cache.config.context_length - sequence.length + 1 for sequence in self.cache.sequences]
        finished = [False] * len(room)
        for step in range(self.sampling.max_new_tokens):
            started = time.perf_counter()
            # On a GPU the next step is under way before the host reads this one's token; a CPU would only be delayed.
            arriving = _to_host(told)
            following = self._step(token) if ahead and self.cache.steps < self.cache.max_steps else None
            new: list[int | None] = []
            for row, value in enumerate(arriving()):
                if finished[row]:
                    new.append(None)
                    continue
                if value == NOT_FINITE:
                    self.intact = False
                    raise self._explain(self.tokens)
                new.append(value)
                self.tokens[row].append(value)
                stopped = not self.sampling.ignore_eos and value in self.model.config.eos_token_ids
                self.finish[row] = "stop" if stopped else "length"
                finished[row] = stopped or step + 1 >= room[row]
            self.decode_s += time.perf_counter() - started
            yield new
            if self.stopped or all(finished) or step + 1 == self.sampling.max_new_tokens:
                return
            started = time.perf_counter()
            token, told = self._step(token) if following is None else following
            self.decode_s += time.perf_counter() - started

    def _step(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """Feed tokens [B]; what `_choose` says of the next."""
        self.intact = False
        logits = self._decode_step(self.model, self.cache, token, self._stop)
        if self.observer is not None:
            self.observer.stepped(self.cache)
        self.intact = True
        return self._choose(logits)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next tokens [B] for the model, and the same for the host, which is told where they are none."""
        token = choose_token(logits, self.sampling, self._generators)
        return token, checked(token, logits)


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
