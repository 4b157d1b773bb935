"""A trace of one greedy answer: every logit, every eviction, every core set.

The tensors have the names and meanings of the golden traces (tests/golden/README.md), so a trace
made here can be compared directly to one of the A-VL authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivlm.cache.recorder import Recorder
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError
from minivlm.generation.diagnosis import not_finite
from minivlm.generation.steps import decode_step, prefill_step
from minivlm.generation.vlm import VLM


@torch.no_grad()
def trace(
    vlm: VLM,
    ids: Tensor,
    features: list[Tensor],
    steps: int,
    settings: CacheSettings,
    forced: Tensor | None = None,
) -> dict[str, Tensor]:
    """Run `steps` greedy steps on a prompt and record what the cache does.

    End-of-sequence tokens are ignored. Step 0 is the prefill of `ids` [S], which hold one id per
    image token, with the images' `features` [N_i, C]. With `forced` [>= steps - 1], those tokens
    are fed instead of the model's own choices.

    Returns tokens [steps] int32, logits [steps, V] float32, fate [L, H_kv, S + steps - 1] int16
    and, where the policy has them, vision_kept [L, K], core_steps [U] and core [U, L, C]. `tokens`
    is always the argmax of `logits`. Raises `UserError` if the answer exceeds the model's context,
    `forced` is too short, or logits are not finite.
    """
    context_length = vlm.config.text.context_length
    if len(ids) + steps - 1 > context_length:
        raise UserError(f"{len(ids)} prompt tokens and {steps} steps exceed the model's context of {context_length}")
    if forced is not None and len(forced) < steps - 1:
        raise UserError(f"teacher forcing has {len(forced)} tokens (expected at least {steps - 1})")

    recorder, cache = Recorder(), vlm.new_cache(settings)
    logits = [prefill_step(vlm.model, cache, [ids], features, steps, recorder)]
    no_stop_ids = torch.zeros(0, dtype=torch.int64, device=vlm.device)
    for step in range(1, steps):
        token = logits[-1].argmax(dim=-1)  # [1]
        if forced is not None:
            token = forced[step - 1 : step].long().to(vlm.device)
        logits.append(decode_step(vlm.model, cache, token, no_stop_ids))
        recorder.stepped(cache)

    all_logits = torch.cat(logits).float().cpu()  # [steps, V]
    tokens = all_logits.argmax(dim=-1)
    finite = all_logits.isfinite().all(dim=-1)  # [steps]
    if not finite.all():
        fed = (tokens if forced is None else forced)[: int(finite.int().argmin())]
        is_vision = ids == vlm.config.image_token_index
        raise not_finite(vlm.model, [ids], [is_vision], lambda: features, [fed.tolist()])
    return {"tokens": tokens.int(), "logits": all_logits} | _recorded(recorder)


def _recorded(recorder: Recorder) -> dict[str, Tensor]:
    """What the recorder saw: when entries were evicted and, if the policy has them, cores."""
    out = {"fate": recorder.fate}
    if recorder.kept:
        out["vision_kept"] = recorder.ordinals(recorder.kept).short()
    if recorder.cores:
        out["core_steps"] = torch.tensor([step for step, _ in recorder.cores], dtype=torch.int32)
        out["core"] = torch.stack([recorder.ordinals(core) for _, core in recorder.cores]).short()
    return out


def expand(vlm: VLM, ids: Tensor, features: list[Tensor]) -> Tensor:
    """Repeat each image token of ids [S] so that every feature of its image has one.

    Ids that are already expanded are returned unchanged. Raises `UserError` if the image tokens
    match neither the number of images nor the number of their features.
    """
    is_image = ids == vlm.config.image_token_index
    image_tokens = int(is_image.sum())
    counts = [len(image_features) for image_features in features]
    if image_tokens == sum(counts):
        return ids
    if image_tokens != len(counts):
        raise UserError(f"input_ids hold {image_tokens} image tokens for {len(counts)} images of {counts} tokens")
    repeats = torch.ones_like(ids)
    repeats[is_image] = torch.tensor(counts)
    return ids.repeat_interleave(repeats)
