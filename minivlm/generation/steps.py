"""Prefill and decode: a model and a cache, one step at a time.

These are the only two ways through the decoder. `decode_step` is a whole step; eager and compiled steps differ in
nothing but its two callables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minivlm.cache.cores import choose_cores
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.prefill_pass import PrefillPass
from minivlm.cache.recorder import Observer
from minivlm.cache.state import CacheState, StepKind
from minivlm.model.llava import Llava
from minivlm.transfer import to_device

PREFILL_TOKENS = 32768  # tokens, padding included, that go through a layer at once

DecodeStep = Callable[[Llava, KVCache, Tensor, Tensor], Tensor]
Forward = Callable[[Llava, KVCache, StepKind, Tensor, Tensor], Tensor]
ChooseCores = Callable[[CacheState], None]


@torch.no_grad()
def prefill_step(
    model: Llava,
    cache: KVCache,
    input_ids: Sequence[Tensor],
    features: Sequence[Tensor],
    max_new_tokens: int,
    observer: Observer | None = None,
    is_vision: Sequence[Tensor] | None = None,
) -> Tensor:
    """Prefill the new tokens [S] of each sequence, with the features of all their images, and return logits [B, V].

    is_vision holds a bool tensor [S] per sequence, on the CPU, which says where image tokens stand; None: wherever the
    id is the image token's. As many sequences go through the layers at once as make up `PREFILL_TOKENS`, which bounds
    the activations. Nothing here waits for the device.
    """
    device = model.lm_head.weight.device
    ids = [row.cpu() for row in input_ids]
    masks = [row == model.config.image_token_index for row in ids] if is_vision is None else is_vision
    rows_at_once = max(1, PREFILL_TOKENS // max(len(row) for row in ids))
    padded = to_device(pad_sequence(ids, batch_first=True), device)
    embeds = model.embed(padded, features, pad_sequence(list(masks), batch_first=True))
    passes = cache.prefill(masks, max_new_tokens, rows_at_once)
    logits = [prefill_logits(model, each, embeds[each.rows.start : each.rows.stop]) for each in passes]
    if observer is not None:
        observer.prefilled(cache, passes[0])
    return torch.cat(logits)


def prefill_logits(model: Llava, prefill: PrefillPass, embeds: Tensor) -> Tensor:
    """Run one pass over its rows' embeddings [B, S, C]; the logits [B, V] after each row's last token."""
    hidden = model(*prefill.enter(embeds), prefill)
    last = torch.stack([row[n - 1] for row, n in zip(hidden, prefill.lengths, strict=True)])  # [B, C]
    return model.lm_head(last)


def forward_step(model: Llava, cache: KVCache, kind: StepKind, token: Tensor, stop: Tensor) -> Tensor:
    """A decode step on the device, without the choice of cores; to be compiled once for each kind of step.

    A sequence at its end, by one of the `stop` ids or by the model's context, stores nothing any more.
    """
    position = cache.position
    cache.active.logical_and_(~torch.isin(token, stop) & (position[:, 0] < cache.config.context_length))
    decode = cache.decode(kind)
    hidden = model(model.language_model.embed_tokens(token[:, None]), position, decode)
    decode.finish()
    cache.stored.add_(cache.active)
    return model.lm_head(hidden[:, 0])


def decode_step(
    model: Llava,
    cache: KVCache,
    token: Tensor,
    stop: Tensor,
    *,
    forward: Forward = forward_step,
    choose: ChooseCores = choose_cores,
) -> Tensor:
    """Feed one token [B] per sequence and return the next logits [B, V].

    `stop` holds the ids [n] that end a sequence. `forward` and `choose` may be compiled;
    the cache then has to be static. The choice of cores is a graph of its own: torch 2.11 miscompiles it inside the
    step's.
    """
    kind = cache.next_kind
    logits = forward(model, cache, kind, token, stop)
    if kind == "refresh":
        choose(cache)
    cache.finish_step(kind)
    return logits
