"""The same computation by this library (`ours`) and by transformers (`reference`), on one random checkpoint.

Both return the same named tensors, from the vision tower to 32 greedy tokens. `python tests/helpers/parity.py` stores a
sample of the reference's values in tests/golden/parity, so that they are compared even where transformers is missing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import paths
import tiny
from minivlm import VLM, Sampling, preset
from minivlm.inputs.processor import ModelInputs
from minivlm.model import anyres
from minivlm.model.config import VLMConfig
from minivlm.model.llava import Llava

GOLDEN = paths.GOLDEN / "parity"
STEPS = 32
# The sizes (height, width) of each case's images. Their best resolutions, tile counts and unpadding all differ.
CASES: dict[str, list[tuple[int, int]]] = {"one image": [(30, 100)], "two images": [(100, 57), (56, 56)], "text": []}


@dataclass(frozen=True)
class Prompt:
    ids: Tensor  # [S]; each image has as many tokens as features
    pixels: Tensor | None  # [images, 3, s, s], or [images, tiles, 3, s, s] for NeXT
    sizes: list[tuple[int, int]]  # (height, width) of each image


def make_prompt(config: VLMConfig, case: str) -> Prompt:
    """Text, image, text, image, ... text. Ids and pixels are random, from a seed that follows from the case."""
    sizes = CASES[case]
    generator = torch.Generator().manual_seed(len(sizes))

    def text(length: int) -> Tensor:
        return torch.randint(3, 250, (length,), generator=generator)

    parts = [torch.tensor([1]), text(5)]
    for size in sizes:
        parts += [torch.full((anyres.image_tokens(size, config),), config.image_token_index), text(4)]
    side = config.vision.image_size
    shape: tuple[int, ...] = (len(sizes), 3, side, side)
    if config.is_next and sizes:
        counts = [anyres.num_tiles(size, config) for size in sizes]
        shape = (len(sizes), max(counts), 3, side, side)
    pixels = torch.rand(shape, generator=generator) * 4 - 2
    if config.is_next:
        for image, size in zip(pixels, sizes, strict=True):
            image[anyres.num_tiles(size, config) :] = 0  # images with fewer tiles are padded with zeros
    return Prompt(torch.cat(parts), pixels if sizes else None, sizes)


@torch.inference_mode()
def ours(model: Llava, prompts: Sequence[Prompt]) -> list[dict[str, Tensor]]:
    """What this library computes: one dict per prompt, with the prompts run as one ragged, right-padded batch."""
    results = [image_results(model, prompt) for prompt in prompts]
    vlm = VLM(model)
    inputs = batch(prompts, vlm.config.image_token_index)
    features = [result["packed"] for result in results if result]
    for result, logits in zip(results, prompt_logits(vlm, inputs, features), strict=True):
        result["logits"] = logits
    cache = vlm.new_cache(preset("full"), range(len(prompts)))
    steps = list(vlm.generate(inputs, cache, Sampling(max_new_tokens=STEPS, ignore_eos=True)))
    for result, tokens in zip(results, torch.tensor(steps).T, strict=True):
        result["tokens"] = tokens
    return results


def image_results(model: Llava, prompt: Prompt) -> dict[str, Tensor]:
    """What the vision tower, the projector and the packing of tiles return; empty for a prompt without images."""
    if prompt.pixels is None:
        return {}
    tower = model.vision_tower(prompt.pixels.flatten(0, -4))
    return {
        "tower": tower,
        "projector": model.multi_modal_projector(tower),
        "packed": torch.cat(model.image_features(prompt.pixels, prompt.sizes)),
    }


def batch(prompts: Sequence[Prompt], image_token: int) -> ModelInputs:
    """A batch as the processor lays it out: ids are padded at the right, and images with tiles of zeros."""
    pixels = [image for prompt in prompts if prompt.pixels is not None for image in prompt.pixels]
    ids = [prompt.ids for prompt in prompts]
    return ModelInputs.of_rows(
        ids,
        [row == image_token for row in ids],
        pad_sequence(pixels, batch_first=True) if pixels else None,
        [size for prompt in prompts for size in prompt.sizes],
    )


def prompt_logits(vlm: VLM, inputs: ModelInputs, features: Sequence[Tensor]) -> list[Tensor]:
    """The logits [S, V] at all positions of each prompt, from one prefill pass into a full cache."""
    prompts, is_vision = inputs.rows()
    cache = vlm.new_cache(preset("full"), range(len(prompts)))
    (prefill_pass,) = cache.prefill(is_vision, 1)
    positions = torch.arange(inputs.input_ids.shape[1]).expand_as(inputs.input_ids)
    hidden = vlm.model(vlm.model.embed(inputs.input_ids, features), positions, prefill_pass)  # [B, S, C]
    return [vlm.model.lm_head(states[: len(ids)]) for states, ids in zip(hidden, prompts, strict=True)]


def load_reference(folder: Path):
    """The checkpoint as a float32 model of transformers, which has to be installed."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def reference(model, prompt: Prompt) -> dict[str, Tensor]:
    """What transformers computes for one prompt, under the same names as `ours`."""
    result: dict[str, Tensor] = {}
    images: dict[str, Tensor] = {}
    if prompt.pixels is not None:
        images = {"pixel_values": prompt.pixels}
        if prompt.pixels.dim() == 5:
            images["image_sizes"] = torch.tensor(prompt.sizes)
        states = model.model.vision_tower(prompt.pixels.flatten(0, -4), output_hidden_states=True).hidden_states
        layers = model.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        result["tower"] = torch.cat([states[i] for i in layers], dim=-1)
        result["projector"] = model.model.multi_modal_projector(result["tower"])
        result["packed"] = torch.cat(list(model.model.get_image_features(**images).pooler_output))
    out = model(input_ids=prompt.ids[None], use_cache=True, **images)
    result["logits"] = out.logits[0]
    tokens = [out.logits[0, -1].argmax()]
    for _ in range(STEPS - 1):
        out = model(input_ids=tokens[-1].view(1, 1), past_key_values=out.past_key_values, use_cache=True)
        tokens.append(out.logits[0, -1].argmax())
    result["tokens"] = torch.stack(tokens)
    return result


def thin(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tokens, and of every other tensor at most 200 values, evenly spaced."""

    def sample(tensor: Tensor) -> Tensor:
        return tensor.flatten()[:: tensor.numel() // 200 + 1]

    return {name: (tensor if name == "tokens" else sample(tensor)).clone() for name, tensor in result.items()}


def main() -> None:
    """Store a sample of the reference's values for every family, with and without grouped key/value heads."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for family in tiny.FAMILIES:
        frozen = {}
        for kv_heads in (4, 2):
            with tempfile.TemporaryDirectory() as folder:
                model = load_reference(tiny.write(Path(folder), family, kv_heads=kv_heads, tokenizer=False))
            config = VLMConfig.from_dict(tiny.make_config(family, kv_heads=kv_heads))
            for case in CASES:
                result = thin(reference(model, make_prompt(config, case)))
                frozen |= {f"{kv_heads}/{case}/{name}": tensor for name, tensor in result.items()}
        save_file(frozen, GOLDEN / f"{family}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
