"""The explicit KV cache: what is stored, what a decode step reads, what it evicts.

The decoder runs against one of two passes over a cache: `cache.prefill(...)` for the tokens of a turn, and
`cache.decode()` for one token per sequence.  Everything that depends on the step is a table made at prefill and
indexed by tensors, so a step neither allocates nor waits for the device:

- a step writes its token into the slot that the previous step's eviction freed, or into the next unused one,
  attends, and only then chooses its own victim;
- between refreshes the core, the system prefix and the text take part; in a refresh all do, and it re-chooses the core;
- finished sequences write nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minivlm.cache import attention, storage
from minivlm.cache.buffers import Layer, bucket
from minivlm.cache.policy import Policy, Prompt
from minivlm.cache.prefill_pass import Prefill, Turn
from minivlm.cache.ranking import LAST, best_first, order_key
from minivlm.errors import UserError
from minivlm.model.config import TextConfig

CLASSES = ("system", "vision core", "vision secondary", "text")


@dataclass
class Track:
    """What the host knows of one sequence."""

    sample: int  # its number, which seeds random policies
    seen: int = 0  # tokens that have a position, the answer so far not counted
    managed: list[int] = field(default_factory=list)  # positions of the tokens the budget is over, in order
    vision: list[int] = field(default_factory=list)  # positions of all vision tokens
    tail: list[int] = field(
        default_factory=lambda: [0]
    )  # live tail entries once 0, 1, 2, ... tokens of the answer are stored


class KVCache:
    """Keys and values of a batch of sequences in every layer, under one policy.

    `static` makes decode steps run on fixed shapes, for `torch.compile`; otherwise they slice what is live.  `gather`
    makes a static core step read its entries by index and no others, which a GPU does as fast as in a row; a CPU does
    not, and passes over all that is kept.  None: as suits the device.
    """

    def __init__(
        self, config: TextConfig, policy: Policy, samples: Sequence[int] = (0,), *,
        device: torch.device | str = "cpu", static: bool = False, gather: bool | None = None,
    ) -> None:  # fmt: skip
        self.config, self.policy, self.device, self.static = config, policy, torch.device(device), static
        self.gather = static and (self.device.type == "cuda" if gather is None else gather)
        self.layers: list[Layer] = []
        self.tables = torch.zeros(3, len(samples), 0, dtype=torch.int64, device=self.device)
        self.fed = torch.zeros(len(samples), dtype=torch.int64, device=self.device)  # answer tokens stored in this turn
        self.base = torch.zeros_like(self.fed)  # position of the answer's first token
        self.active = torch.ones(len(samples), dtype=torch.bool, device=self.device)  # sequences not finished
        self.reset(samples)

    def reset(self, samples: Sequence[int]) -> None:
        """Forget all entries; as many new sequences as before use the buffers again where they fit."""
        self.tracks = [Track(sample) for sample in samples]
        self.turns = 0
        self.kinds: list[str] = []  # of this turn's decode steps
        self.max_steps = 0  # for which there is room

    @property
    def _whole(self) -> bool:
        """Whether the token budget is over all entries, vision and text alike."""
        return self.policy.budget is not None and self.policy.budget.over == "all"

    @property
    def indexed(self) -> bool:
        """Whether layers list their cores: where core steps come and read by index."""
        return self.gather and self.policy.vision is not None and self.policy.vision.interval > 1

    # --- a turn --------------------------------------------------------------------------------------------------

    def prefill(
        self, is_vision: Sequence[Tensor], max_new_tokens: int, rows_at_once: int | None = None
    ) -> list[Prefill]:
        """Begin a turn: passes over its new tokens, to be run in this order, with room for `max_new_tokens` >= 1.

        A pass takes `rows_at_once` sequences (all, if None; and all in a later turn, whose old entries share buffers).

        is_vision holds one bool tensor [S_b] per sequence, on the CPU; the answer's last token is never stored, so in a
        later turn it comes first.  Raises `UserError` where the new tokens leave the model's context or the policy's
        budget is infeasible; the cache is then as it was.
        """
        stored = self.fed.tolist() if self.turns else [0] * len(self.tracks)
        for track, mask, count in zip(self.tracks, is_vision, stored):
            if len(mask) == 0 or mask[-1]:
                raise UserError("a prompt has to end in text: the last row's attention is what policies score with")
            if track.seen + count + len(mask) > self.config.context_length:
                raise UserError(
                    f"the sequence has {track.seen + count + len(mask)} tokens, the model's context only {self.config.context_length}"
                )
            for part in (self.policy.vision, self.policy.filter):
                if part is not None:
                    part.keep(
                        Prompt(len(mask), int(mask.sum()))
                    )  # an infeasible share is told before anything has changed
        starts = [track.seen + count for track, count in zip(self.tracks, stored)]
        room = max(self.config.context_length - start - len(mask) for start, mask in zip(starts, is_vision))
        self.max_steps = max(0, min(max_new_tokens - 1, room))
        turns = [self._turn(track, mask, count) for track, mask, count in zip(self.tracks, is_vision, stored)]
        self.make_tables()
        self.kinds = []
        self.turns += 1
        later, batch = self.turns > 1, len(turns)
        step = batch if later or rows_at_once is None else rows_at_once
        spans = [range(first, min(first + step, batch)) for first in range(0, batch, step)]
        num_layers = self.config.num_hidden_layers
        return [
            Prefill(self.policy, self.layers, turns, span, later, num_layers, self.indexed, self.device)
            for span in spans
        ]

    def _turn(self, track: Track, is_vision: Tensor, stored: int) -> Turn:
        """Advance one sequence's bookkeeping by the stored answer and the turn's new tokens."""
        past_tail = track.tail[stored]
        track.managed += range(track.seen, track.seen + stored)
        start = track.seen + stored
        vision = is_vision.nonzero()[:, 0].tolist()
        system = 0
        if self.turns == 0 and not self._whole:
            system = vision[0] if vision else min(1, len(is_vision))
        new = is_vision.new_ones(len(is_vision)) if self._whole else ~is_vision
        managed = [start + i for i in new.nonzero()[:, 0].tolist()[system:]]
        track.managed += managed
        track.vision += [start + i for i in vision]
        track.seen = start + len(is_vision)
        limit, recent = self._limits(len(track.managed))
        track.tail = [min(past_tail + len(managed), limit)]
        for step in range(1, self.max_steps + 1):
            track.tail.append(min(track.tail[-1] + 1, self._limits(len(track.managed) + step)[0]))
        return Turn(
            sample=track.sample,
            start=start,
            is_vision=is_vision,
            system=system,
            past_tail=past_tail,
            tail=track.tail[0],
            recent_from=self._position(track, len(track.managed) - recent),
            # A step's token is there before its victim goes.
            capacity=max([track.tail[0]] + [before + 1 for before in track.tail[:-1]]),
        )

    def _limits(self, seen: int) -> tuple[int, int]:
        return (seen, 0) if self.policy.budget is None else self.policy.budget.limits(seen)

    def _position(self, track: Track, order: int) -> int:
        """Original position of the order-th token the budget is over; the answer's tokens follow one another."""
        order = max(order, 0)
        return track.managed[order] if order < len(track.managed) else track.seen + order - len(track.managed)

    def make_tables(self) -> None:
        """Per sequence and step, on the device: tail entries to attend to, whether one is evicted, what is protected."""
        surplus = [(0, 0, 0)] * (bucket(self.max_steps) - self.max_steps)
        rows = [[self._step_row(track, step) for step in range(self.max_steps)] + surplus for track in self.tracks]
        tables = torch.tensor(rows, dtype=torch.int64).view(len(rows), -1, 3).permute(2, 0, 1)  # [3, B, steps]
        if self.tables.shape != tables.shape:
            self.tables = torch.empty(tables.shape, dtype=torch.int64, device=self.device)
        self.tables.copy_(tables)
        self.base.copy_(torch.tensor([track.seen for track in self.tracks]))
        self.fed.zero_()
        self.active.fill_(True)

    def _step_row(self, track: Track, step: int) -> tuple[int, bool, int]:
        seen = len(track.managed) + step + 1
        return (
            track.tail[step] + 1,
            track.tail[step + 1] <= track.tail[step],
            self._position(track, seen - self._limits(seen)[1]),
        )

    # --- decode --------------------------------------------------------------------------------------------------

    def decode(self, kind: str) -> Decode:
        """The pass of a step of this `kind`, for `generate.decode_step`, after which comes `advance`."""
        return Decode(self, kind)

    @property
    def steps(self) -> int:
        """Decode steps of this turn."""
        return len(self.kinds)

    @property
    def kind(self) -> str:
        """What takes part in the next step: "core", or all that is kept: "refresh" if it re-chooses the cores, else "full"."""
        interval = 0 if self.policy.vision is None else self.policy.vision.interval
        if interval <= 0 or not any(track.vision for track in self.tracks):
            return "full"
        return "refresh" if (self.steps + 1) % interval == 0 else "core"

    @property
    def position(self) -> Tensor:
        """Original position [B, 1] of the token that the next step feeds."""
        return (self.base + self.fed)[:, None]

    def advance(self, kind: str) -> None:
        """Note that a step ran as `kind`: what the host knows of it."""
        self.kinds.append(kind)

    def buffers(self) -> Iterator[Tensor]:
        """All tensors that a decode step reads or writes."""
        yield from (self.tables, self.fed, self.base, self.active)
        for layer in self.layers:
            yield from layer.buffers()

    # --- on disk -------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the cache to a safetensors file; raises `UserError` if it is empty or the file cannot be written."""
        storage.save(self, path)

    def load(self, path: Path, dtype: torch.dtype) -> None:
        """Go on where `save` was called, with a model of `dtype`: the next step or turn is the same as there.

        Raises `UserError`, and changes nothing, for a damaged file and for one of another policy, configuration, dtype or
        number of sequences.
        """
        storage.load(self, path, dtype)

    # --- accounting ----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes allocated: the layers' (see `Layer.nbytes`) and the step tables'."""
        return sum(layer.nbytes for layer in self.layers) + self.tables.nbytes

    def entry_bytes(self) -> int:
        """Bytes of one entry's key and value in all key/value heads of one layer."""
        layer = self.layers[0]
        return 2 * self.config.num_key_value_heads * self.config.head_dim * layer.k.element_size()

    def full_bytes(self) -> int:
        """Bytes of the entries that the full cache would hold now."""
        stored = self.fed.tolist()
        tokens = sum(track.seen + count for track, count in zip(self.tracks, stored))
        return tokens * len(self.layers) * self.entry_bytes()

    def live_bytes(self) -> int:
        """Bytes of the entries held now."""
        return (
            sum(sum(held.values()) for held in self.live_entries())
            * self.entry_bytes()
            // self.config.num_key_value_heads
        )

    def live_entries(self) -> list[dict[str, int]]:
        """Per layer, the entries held now, by class, summed over sequences and key/value heads."""
        stored, heads = self.fed.tolist(), self.config.num_key_value_heads
        counts = []
        for i, layer in enumerate(self.layers):
            held = dict.fromkeys(CLASSES, 0)
            for b, (track, row) in enumerate(zip(self.tracks, layer.rows)):
                tail, vision = track.tail[stored[b]] * heads, 0
                if self._whole:
                    positions = self.live_positions(i, b)
                    vision = int(torch.isin(positions, positions.new_tensor(track.vision)).sum())
                held["system"] += row.system * heads
                held["vision core"] += row.core * heads + vision
                held["vision secondary"] += (row.vision - row.core) * heads
                held["text"] += tail - vision
            counts.append(held)
        return counts

    def entries_attended(self) -> dict[str, float]:
        """Entries that took part in a decode step of this turn on average, by class, per sequence, layer and head.

        A whole-cache budget keeps no classes apart: then all count as "all".
        """
        attended = dict.fromkeys(CLASSES if not self._whole else ("all",), 0)
        stored = self.fed.tolist()
        for b, (track, steps) in enumerate(zip(self.tracks, stored)):
            wide = sum(kind != "core" for kind in self.kinds[:steps])
            tail = sum(track.tail[:steps]) + steps
            for row in (layer.rows[b] for layer in self.layers):
                if self._whole:
                    attended["all"] += tail
                    continue
                attended["system"] += row.system * steps
                attended["vision core"] += row.core * steps
                attended["vision secondary"] += (row.vision - row.core) * wide
                attended["text"] += tail
        return {name: count / max(sum(stored) * len(self.layers), 1) for name, count in attended.items()}

    def live_positions(self, layer: int, b: int) -> Tensor:
        """Original positions [H_kv, n] of row b's entries: vision, system, tail."""
        held = self.layers[layer]
        return held.position[b].gather(1, held.live_slots(b, self.tracks[b].tail[int(self.fed[b])]))

    def core_positions(self, layer: int, b: int) -> Tensor:
        """Original positions [C] of row b's core in a layer, best first."""
        held = self.layers[layer]
        vision = held.vision_slots(b)
        core = held.takes_part[b, vision] > 0
        position = held.position[b, 0, vision][core]
        return position[best_first(held.vision_row[b, vision][core], position)].cpu()


class Decode:
    """One step's pass; to be handed to the decoder as its cache."""

    def __init__(self, cache: KVCache, kind: str) -> None:
        self.cache, self.kind = cache, kind

    def survivors(self, layer: int) -> None:
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token per sequence: q [B, H, 1, D], k and v [B, H_kv, 1, D] -> [B, H, 1, D]."""
        cache, held = self.cache, self.cache.layers[layer]
        step = cache.fed[:, None]
        used, evict, protected = (table.gather(1, step) for table in cache.tables)  # each [B, 1]
        self._write(held, k, v)
        want_row, tail = cache.policy.budget is not None or self.kind == "refresh", held.tail
        if cache.static:
            keys, values, live, tail = self._reading(held, used)
            out, row = attention.decode_static(q, keys, values, live, want_row)
        else:
            core = held.takes_part > 0 if self.kind == "core" else None
            out, row = attention.decode_plain(q, held.k, held.v, self._spans(held), core, want_row)
        if self.kind == "refresh":
            attended = row[:, :, :tail].sum(dim=1) / q.shape[1]  # [B, slots left of the tail]
            held.vision_row.copy_(torch.where(cache.active[:, None], attended, held.vision_row))
        after = used.expand_as(held.next_slot)
        if cache.policy.budget is not None:
            after = torch.where(evict.bool(), self._victim(held, row[:, :, tail:], used, protected), after)
        held.next_slot.copy_(torch.where(cache.active[:, None], held.tail + after, held.next_slot))
        return out

    def _reading(self, held: Layer, used: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Keys and values [B, H_kv, n, D] to pass over, which of the n are live [B, n], and where among them the tail begins."""
        slots = torch.arange(held.slots, device=used.device)
        live = (slots >= held.first) & (slots < held.tail + used)
        if self.kind == "core":
            live = live & (held.takes_part > 0)
        if self.kind != "core" or held.core_slots is None:
            return held.k, held.v, live, held.tail
        (batch, kv_heads), width = held.next_slot.shape, held.core_slots.shape[1]
        listed = slots[:width] < held.core_size + held.tail - held.system_from  # [B, width]
        index = torch.cat((held.core_slots, slots[held.tail :].expand(batch, -1)), dim=1)  # [B, n]
        row, head = (
            torch.arange(batch, device=used.device)[:, None, None],
            torch.arange(kv_heads, device=used.device)[:, None],
        )
        where = (
            row,
            head,
            index[:, None],
        )  # indexing, not `gather`: that the compiler fuses into the sums over D and n
        return held.k[where], held.v[where], torch.cat((listed, live[:, held.tail :]), dim=1), width

    def _spans(self, held: Layer) -> list[tuple[int, int]]:
        """First and end of each row's live slots."""
        step = self.cache.steps
        return [
            (held.tail - row.fixed, held.tail + track.tail[step] + 1)
            for row, track in zip(held.rows, self.cache.tracks)
        ]

    def _write(self, held: Layer, k: Tensor, v: Tensor) -> None:
        """Put the step's token where the last victim was; a finished row gets back what is there.

        By indexed assignment: of a `scatter_` inductor makes two copies of the whole buffer.
        """
        batch, kv_heads = held.next_slot.shape
        row, head = torch.arange(batch, device=k.device)[:, None], torch.arange(kv_heads, device=k.device)
        where, active = (row, head, held.next_slot), self.cache.active[:, None]  # [B, H_kv], [B, 1]
        held.position[where] = torch.where(active, self.cache.position.int(), held.position[where])
        for buffer, new in ((held.k, k), (held.v, v)):
            buffer[where] = torch.where(active[..., None], new[:, :, 0], buffer[where])

    def _victim(self, held: Layer, row: Tensor, used: Tensor, protected: Tensor) -> Tensor:
        """Score the tail by this step's row [B, H_kv, tail slots]; the worst unprotected entry of each head [B, H_kv]."""
        slots = torch.arange(row.shape[2], device=row.device)
        live = (slots < used)[:, None]  # [B, 1, tail slots]
        new = slots == held.next_slot[..., None] - held.tail
        score = self.cache.policy.budget.score_step(held.score, row, live, new)
        held.score.copy_(torch.where(live & self.cache.active[:, None, None], score, held.score))
        position = held.position[:, :, held.tail :]
        return torch.where(live & (position < protected[..., None]), order_key(score, position), LAST).argmin(dim=2)
