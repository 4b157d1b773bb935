"""A trace of one greedy answer: every logit, every eviction, every core set.

The tensors have the names and meanings of the golden traces (tests/golden/README.md), so a trace of this library can
be laid beside one of the A-VL authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivlm.cache.recorder import Recorder
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError
from minivlm.generation.generate import decode_step, prefill_step
from minivlm.generation.vlm import VLM


@torch.no_grad()
def trace(
    vlm: VLM, ids: Tensor, features: list[Tensor], steps: int, settings: CacheSettings, forced: Tensor | None = None
) -> dict[str, Tensor]:
    """Run `steps` greedy steps (the prefill is step 0) on merged ids [S]; end-of-sequence is ignored.

    With `forced` [>= steps - 1] those tokens are fed instead of the model's own.  Returns tokens [steps] int32, logits
    [steps, V] float32, fate [L, H_kv, S + steps - 1] int16, and where they exist vision_kept [L, K], core_steps [U] and
    core [U, L, C].  Raises `UserError` if the answer leaves the model's context or `forced` is too short.
    """
    if len(ids) + steps - 1 > vlm.config.text.context_length:
        raise UserError(
            f"{len(ids)} prompt tokens and {steps} steps exceed the model's context of {vlm.config.text.context_length}"
        )
    if forced is not None and len(forced) < steps - 1:
        raise UserError(f"teacher forcing has {len(forced)} tokens (expected at least {steps - 1})")
    recorder, cache = Recorder(), vlm.new_cache(settings)
    logits = [prefill_step(vlm.model, cache, [ids], features, steps, recorder)]
    never = torch.zeros(0, dtype=torch.int64, device=vlm.device)
    for step in range(1, steps):
        token = logits[-1].argmax(dim=-1) if forced is None else forced[step - 1 : step].long().to(vlm.device)
        kind = cache.kind
        logits.append(decode_step(vlm.model, cache, kind, token, never))
        cache.advance(kind)
        recorder.stepped(cache, kind)
    all_logits = torch.cat(logits).float().cpu()  # [steps, V]
    out = {"tokens": all_logits.argmax(dim=-1).int(), "logits": all_logits, "fate": recorder.fate}
    if recorder.kept:
        out["vision_kept"] = recorder.ordinals(cache, recorder.kept).short()
    if recorder.cores:
        out["core_steps"] = torch.tensor([step for step, _ in recorder.cores], dtype=torch.int32)
        out["core"] = torch.stack([recorder.ordinals(cache, core) for _, core in recorder.cores]).short()
    return out


def expand(vlm: VLM, ids: Tensor, features: list[Tensor]) -> Tensor:
    """Ids [S] with one image token per image -> one per feature row; ids that are expanded already pass unchanged.

    Raises `UserError` if neither fits.
    """
    is_image = ids == vlm.config.image_token_index
    if int(is_image.sum()) == sum(map(len, features)):
        return ids
    if int(is_image.sum()) != len(features):
        raise UserError(
            f"input_ids hold {int(is_image.sum())} image tokens for {len(features)} images of {[len(f) for f in features]} tokens"
        )
    repeats = torch.ones_like(ids)
    repeats[is_image] = torch.tensor([len(f) for f in features])
    return ids.repeat_interleave(repeats)
