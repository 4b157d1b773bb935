"""The same computation twice: by this library and by transformers, on one random checkpoint.

Both return the same named tensors, from the tower to 32 greedy tokens.  `python tests/parity.py` freezes the
reference's answers, thinned out, in tests/golden/parity, so that they hold where transformers is not installed.
"""

from __future__ import annotations

import sys
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
from minivlm import VLM, CacheSettings, Sampling
from minivlm.inputs.processor import ModelInputs
from minivlm.model import anyres
from minivlm.model.config import VLMConfig
from minivlm.model.llava import Llava

GOLDEN = paths.GOLDEN / "parity"
STEPS = 32
# name -> sizes (height, width) of the images; their best resolutions, tile counts and unpadding all differ
CASES = {"one image": [(30, 100)], "two images": [(100, 57), (56, 56)], "text": []}


@dataclass(frozen=True)
class Prompt:
    ids: Tensor  # [S], image tokens expanded
    pixels: Tensor | None  # [I, 3, s, s] or [I, tiles, 3, s, s]
    sizes: list[tuple[int, int]]


def make_prompt(config: VLMConfig, case: str) -> Prompt:
    """Text, image, text, image, ... text; ids and pixels drawn from a seed that the case fixes."""
    sizes = CASES[case]
    generator = torch.Generator().manual_seed(len(sizes))
    text = lambda n: torch.randint(3, 250, (n,), generator=generator)  # noqa: E731
    parts = [torch.tensor([1]), text(5)]
    for size in sizes:
        parts += [torch.full((anyres.image_tokens(size, config),), config.image_token_index), text(4)]
    side = config.vision.image_size
    shape = (len(sizes), 3, side, side)
    if config.is_next and sizes:
        counts = [anyres.num_tiles(size, config) for size in sizes]
        shape = (len(sizes), max(counts), 3, side, side)
    pixels = torch.rand(shape, generator=generator) * 4 - 2
    if config.is_next:
        for image, size in zip(pixels, sizes):
            image[anyres.num_tiles(size, config) :] = 0
    return Prompt(torch.cat(parts), pixels if sizes else None, sizes)


@torch.inference_mode()
def ours(model: Llava, prompts: Sequence[Prompt]) -> list[dict[str, Tensor]]:
    """One dict per prompt, the prompts run as one ragged, right-padded batch."""
    results: list[dict[str, Tensor]] = []
    for prompt in prompts:
        result = {}
        if prompt.pixels is not None:
            flat = prompt.pixels.flatten(0, -4)
            result["tower"] = model.vision_tower(flat)
            result["projector"] = model.multi_modal_projector(result["tower"])
            result["packed"] = torch.cat(model.image_features(prompt.pixels, prompt.sizes))
        results.append(result)
    vlm, inputs, samples = VLM(model), batch(prompts), range(len(prompts))
    for result, row in zip(results, prompt_logits(vlm, inputs, [result["packed"] for result in results if result])):
        result["logits"] = row
    sampling = Sampling(max_new_tokens=STEPS, ignore_eos=True)
    steps = list(vlm.generate(inputs, vlm.new_cache(CacheSettings(), samples), sampling))
    for result, row in zip(results, torch.tensor(steps).T):
        result["tokens"] = row
    return results


def batch(prompts: Sequence[Prompt]) -> ModelInputs:
    """As the processor lays out a batch: ids padded at the right, images with zero tiles."""
    pixels = [image for prompt in prompts if prompt.pixels is not None for image in prompt.pixels]
    return ModelInputs(
        input_ids=pad_sequence([prompt.ids for prompt in prompts], batch_first=True),
        lengths=torch.tensor([len(prompt.ids) for prompt in prompts]),
        pixel_values=pad_sequence(pixels, batch_first=True) if pixels else None,
        image_sizes=[size for prompt in prompts for size in prompt.sizes],
    )


def prompt_logits(vlm: VLM, inputs: ModelInputs, features: Sequence[Tensor]) -> list[Tensor]:
    """Logits [S, V] of every position of each prompt, prefilled into a full cache."""
    rows = [ids[:length] for ids, length in zip(inputs.input_ids, inputs.lengths)]
    (run,) = vlm.new_cache(CacheSettings(), range(len(rows))).prefill(
        [ids == vlm.config.image_token_index for ids in rows], 1
    )
    positions = torch.arange(inputs.input_ids.shape[1]).expand_as(inputs.input_ids)
    hidden = vlm.model(vlm.model.embed(inputs.input_ids, features), positions, run)
    return [vlm.model.lm_head(row[: len(ids)]) for row, ids in zip(hidden, rows)]


def load_reference(folder: Path):
    """The checkpoint in transformers, float32; only for callers that have it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def reference(model, prompt: Prompt) -> dict[str, Tensor]:
    """What transformers computes for one prompt."""
    result, images = {}, {}
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
    """About 200 values of each tensor, spread over it; the tokens whole."""
    return {
        name: tensor.clone() if name == "tokens" else tensor.flatten()[:: tensor.numel() // 200 + 1].clone()
        for name, tensor in result.items()
    }


def main() -> None:
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
    sys.exit(main())
