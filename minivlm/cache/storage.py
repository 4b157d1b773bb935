"""A KV cache on disk: saved in the middle of an answer, it goes on elsewhere exactly as it would have gone on here.

One safetensors file.  Its tensors are the layers' buffers as they are, dead slots included, and per sequence what the
host knows; its metadata the policy with all its numbers, the decoder's configuration, and counters.  Step tables and
boundaries follow from these and are made anew.  A file is not trusted: whatever a step would index with is checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minivlm.cache.buffers import Layer, Row
from minivlm.errors import UserError
from minivlm.files import write_whole

if TYPE_CHECKING:
    from minivlm.cache.kv_cache import KVCache

_VERSION = 2
_KEY = "minivlm.kv_cache"  # of the metadata
_BUFFERS = ("k", "v", "position", "score", "vision_row", "takes_part", "next_slot")
_COUNTS = ("vision", "core", "system", "tail", "capacity")  # the fields of a `Row`
_LISTS = ("managed", "vision", "tail")  # of a `Track`


def save(cache: KVCache, path: Path) -> None:
    """Write all of a prefilled cache to one file; raises `UserError` where that is impossible."""
    if not cache.turns:
        raise UserError(f"{path}: an empty cache is not saved (expected one after a prefill)")
    tensors = {"fed": cache.fed, "active": cache.active}
    for i, layer in enumerate(cache.layers):
        tensors |= {f"layers.{i}.{name}": getattr(layer, name) for name in _BUFFERS if getattr(layer, name) is not None}
        tensors[f"layers.{i}.rows"] = torch.tensor([[getattr(row, name) for name in _COUNTS] for row in layer.rows])
    for b, track in enumerate(cache.tracks):
        tensors |= {f"tracks.{b}.{name}": torch.tensor(getattr(track, name), dtype=torch.int64) for name in _LISTS}
    about = {
        **_identity(cache, cache.layers[0].k.dtype),
        "samples": [track.sample for track in cache.tracks],
        "seen": [track.seen for track in cache.tracks],
        "turns": cache.turns,
        "kinds": cache.kinds,
    }

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, {_KEY: json.dumps(about)})
        except SafetensorError as error:
            raise OSError(str(error)) from None

    write_whole(path, write)


def load(cache: KVCache, path: Path, dtype: torch.dtype) -> None:
    """Put what was saved into `cache`, whose policy, configuration and number of sequences have to be those of the file.

    `dtype` is the model's.  Raises `UserError` for a mismatch and for a damaged file; the cache is then as it was.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = _read_about(file.metadata() or {})
            _refuse_mismatch(about, json.loads(json.dumps(_identity(cache, dtype))))
            stored = _Stored(file, about, cache, dtype)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for b, track in enumerate(cache.tracks):
        track.sample, track.seen = about["samples"][b], about["seen"][b]
        track.managed, track.vision, track.tail = stored.lists[b]
    cache.layers[:] = stored.layers
    cache.turns, cache.kinds, cache.max_steps = about["turns"], about["kinds"], stored.max_steps
    cache.make_tables()
    cache.fed.copy_(stored.fed)
    cache.active.copy_(stored.active)


def _identity(cache: KVCache, dtype: torch.dtype) -> dict[str, Any]:
    """What has to be equal for a cache to go on."""
    parts = {name: getattr(cache.policy, name) for name in ("vision", "budget", "filter")}
    return {
        "version": _VERSION,
        "policy": {
            "name": cache.policy.name,
            "window": cache.policy.window,
            **{
                name: {"rule": None} if part is None else {"rule": type(part).__name__, **asdict(part)}
                for name, part in parts.items()
            },
        },
        "config": asdict(cache.config),
        "dtype": str(dtype).removeprefix("torch."),
        "sequences": len(cache.tracks),
    }


def _refuse_mismatch(about: dict[str, Any], ours: dict[str, Any]) -> None:
    found = dict(_flat(about))
    for name, value in _flat(ours):
        if found.get(name) != value:
            raise UserError(f"saved with {name} {json.dumps(found.get(name))}, to be loaded with {json.dumps(value)}")


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _read_about(metadata: dict[str, str]) -> dict[str, Any]:
    if _KEY not in metadata:
        raise UserError(f"not a saved cache (expected metadata under {_KEY})")
    try:
        about = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise UserError(f"damaged metadata ({error})") from None
    if not isinstance(about, dict):
        raise UserError("damaged metadata (expected an object)")
    return about


class _Stored:
    """A file's tensors, each one checked, in new layers on the cache's device."""

    def __init__(self, file: Any, about: dict[str, Any], cache: KVCache, dtype: torch.dtype) -> None:
        self.file, self.names, self.config, batch = file, set(file.keys()), cache.config, len(cache.tracks)
        context = cache.config.context_length
        _whole_numbers("samples", about.get("samples"), batch, -(2**62), 2**62)
        _whole_numbers("seen", about.get("seen"), batch, 1, context)
        _whole_numbers("turns", [about.get("turns")], 1, 1, 2**62)
        kinds = about.get("kinds")
        if not isinstance(kinds, list) or not all(kind in ("core", "refresh", "full") for kind in kinds):
            raise UserError("damaged metadata (kinds)")
        self.lists = [self._lists(b, about["seen"][b]) for b in range(batch)]
        self.max_steps = len(self.lists[0][2]) - 1
        if len(kinds) > self.max_steps or any(len(tail) != self.max_steps + 1 for _, _, tail in self.lists):
            raise UserError("damaged (steps that do not agree)")
        self.fed = self._tensor("fed", (batch,), torch.int64, 0, len(kinds))
        self.active = self._tensor("active", (batch,), torch.bool)
        self.layers = [self._layer(i, cache, dtype) for i in range(cache.config.num_hidden_layers)]
        if self.names:
            raise UserError(f"damaged (unexpected tensor {min(self.names)!r})")

    def _lists(self, b: int, seen: int) -> tuple[list[int], list[int], list[int]]:
        """Positions the budget is over, positions of vision, and tail lengths of sequence b."""
        found = []
        for name, last in zip(_LISTS, (seen - 1, seen - 1, self.config.context_length)):
            found.append(self._tensor(f"tracks.{b}.{name}", (None,), torch.int64, 0, last).tolist())
        managed, vision, tail = found
        ascending = all(first < second for places in (managed, vision) for first, second in zip(places, places[1:]))
        if (
            not ascending
            or not tail
            or tail[0] > len(managed)
            or any(then - now not in (0, 1) for now, then in zip(tail, tail[1:]))
        ):
            raise UserError(f"damaged (the lists of sequence {b})")
        return managed, vision, tail

    def _layer(self, i: int, cache: KVCache, dtype: torch.dtype) -> Layer:
        batch, scored = len(cache.tracks), cache.policy.budget is not None
        heads, dim = cache.config.num_key_value_heads, cache.config.head_dim
        counts = self._tensor(
            f"layers.{i}.rows", (batch, len(_COUNTS)), torch.int64, 0, cache.config.context_length + 1
        )
        rows = [Row(*row) for row in counts.tolist()]
        for row, (_, _, tail) in zip(rows, self.lists):
            if row.core > row.vision or (row.tail, row.capacity) != (
                tail[0],
                max([tail[0], *(n + 1 for n in tail[:-1])]),
            ):
                raise UserError(f"damaged (layers.{i}.rows)")
        left, slots = Layer.extent(rows)
        # All is read and checked before anything is allocated by the counts.
        shapes = dict(
            k=(batch, heads, slots, dim),
            v=(batch, heads, slots, dim),
            position=(batch, heads, slots),
            takes_part=(batch, slots),
            next_slot=(batch, heads),
        )
        shapes |= dict(vision_row=(batch, left), **dict(score=(batch, heads, slots - left)) if scored else {})
        kinds = dict(k=dtype, v=dtype, position=torch.int32, next_slot=torch.int64)
        ranges = dict(position=(0, cache.config.context_length - 1), next_slot=(left, slots - 1))
        found = {
            name: self._tensor(f"layers.{i}.{name}", shape, kinds.get(name, torch.float32), *ranges.get(name, ()))
            for name, shape in shapes.items()
        }
        layer = Layer(rows, heads, dim, scored, cache.indexed, dtype, cache.device)
        for b, row in enumerate(rows):
            core = found["takes_part"][b, layer.vision_slots(b)] == 1
            layer.mark_core(b, core.to(cache.device))
            if int(core.sum()) != row.core or not torch.equal(layer.takes_part[b].cpu(), found["takes_part"][b]):
                raise UserError(f"damaged (layers.{i}.takes_part)")
        for name, tensor in found.items():
            getattr(layer, name).copy_(tensor)
        layer.list_core()
        return layer

    def _tensor(
        self,
        name: str,
        shape: tuple[int | None, ...],
        dtype: torch.dtype,
        least: int | None = None,
        most: int | None = None,
    ) -> Tensor:
        """A tensor of the file; None stands for any size."""
        if name not in self.names:
            raise UserError(f"damaged (no tensor {name!r})")
        self.names.remove(name)
        found = self.file.get_slice(name).get_shape()
        if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found)):
            raise UserError(
                f"damaged ({name} has shape {found}, expected {['any' if n is None else n for n in shape]})"
            )
        tensor = self.file.get_tensor(name)
        if tensor.dtype != dtype:
            raise UserError(f"damaged ({name} is {tensor.dtype}, expected {dtype})")
        if least is not None and tensor.numel() and not least <= int(tensor.min()) <= int(tensor.max()) <= most:
            raise UserError(f"damaged ({name} leaves {least}..{most})")
        return tensor


def _whole_numbers(name: str, values: Any, count: int, least: int, most: int) -> None:
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(type(n) is int and least <= n <= most for n in values)
    ):
        raise UserError(f"damaged metadata ({name})")
