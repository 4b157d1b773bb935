"""Why numbers are not finite: the first stage of the model that gives NaN or infinity.

Only called once they are. The prompt and the answer so far go through the model once more, as one sequence, and every
stage is looked at. Nothing is evicted on this way; what only the eviction of entries brings about is not found again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from minivlm.cache import attention
from minivlm.errors import UserError
from minivlm.model.llava import Llava


class _Found(Exception):
    """Ends the pass at the first stage that is not finite."""

    def __init__(self, stage: str, parameters: Sequence[Tensor]) -> None:
        self.stage, self.parameters = stage, parameters


class _Uncached:
    """Causal attention of one whole sequence, in the place of a cache; nothing is kept."""

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.prefill(q, k, v)

    def survivors(self, layer_idx: int) -> None:
        return None


@torch.no_grad()
def not_finite(
    model: Llava,
    input_ids: Sequence[Tensor],
    is_vision: Sequence[Tensor],
    features: Callable[[], Sequence[Tensor]],
    answers: Sequence[Sequence[int]],
) -> UserError:
    """The error that names the first stage of `model` whose output is not finite.

    Each sequence has ids [S], the bool mask [S] of its image tokens, and an answer so far; without any sequence only
    the images are looked at. `features` returns those of all images, by `model`, which must not be compiled: its stages
    are watched by hooks.
    """
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    remedy = "dtype bfloat16 or float32" if dtype == "float16" else "a checkpoint whose numbers stay finite"
    try:
        _run(model, input_ids, is_vision, features, answers)
    except _Found as found:
        if any(parameter.isnan().any() for parameter in found.parameters):
            return UserError(f"the weights of {found.stage} hold NaN (expected a checkpoint without)")
        if any(parameter.isinf().any() for parameter in found.parameters):
            return UserError(f"the weights of {found.stage} hold infinity in {dtype} (expected {remedy})")
        return UserError(f"the numbers overflow {dtype} in {found.stage} (expected {remedy})")
    return UserError(f"the numbers overflow {dtype} under this policy (expected {remedy})")


def _run(
    model: Llava,
    input_ids: Sequence[Tensor],
    is_vision: Sequence[Tensor],
    features: Callable[[], Sequence[Tensor]],
    answers: Sequence[Sequence[int]],
) -> None:
    """Run the whole model; raises `_Found`."""
    device = model.lm_head.weight.device
    with ExitStack() as hooks:
        for stage, module in _stages(model):
            hooks.enter_context(module.register_forward_hook(_watch(stage)))
        images = features()
        newline = [model.image_newline] if model.config.is_next else []
        for image in images:
            _expect_finite("the image features (image_newline)", image, newline)
        if not input_ids:
            return
        ids, mask = (torch.cat(list(rows))[None].to(device) for rows in (input_ids, is_vision))
        prompts = model.embed(ids, images, mask)[0].split([len(row) for row in input_ids])
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = torch.tensor(answer, dtype=torch.int64, device=device)
            embeds = torch.cat((prompt, model.language_model.embed_tokens(tokens)))[None]  # [1, S, C]
            positions = torch.arange(embeds.shape[1], device=device)[None]
            model.lm_head(model(embeds, positions, _Uncached())[:, -1])


def _stages(model: Llava) -> Iterator[tuple[str, nn.Module]]:
    """The parts of the model in the order in which they run, and what the user calls them."""
    tower, decoder = model.vision_tower, model.language_model
    yield "the vision tower's patch embeddings", tower.embeddings
    yield "the vision tower's first norm", tower.pre_layrnorm
    for i, layer in enumerate(tower.encoder.layers):
        yield f"layer {i} of the vision tower", layer
    yield "the projector", model.multi_modal_projector
    yield "the token embeddings", decoder.embed_tokens
    for i, layer in enumerate(decoder.layers):
        yield f"layer {i} of the decoder", layer
    yield "the decoder's last norm", decoder.norm
    yield "the head that gives the logits", model.lm_head


def _watch(stage: str) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        _expect_finite(stage, output, list(module.parameters()))

    return hook


def _expect_finite(stage: str, output: Tensor, parameters: Sequence[Tensor]) -> None:
    if not output.isfinite().all():
        raise _Found(stage, parameters)
