"""Writing a trained model as an ordinary Hugging Face folder, with example pages."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from demo_training.model import CONFIG, MEAN, STD
from demo_training.text import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIALS
from eval.demo import pages
from minivlm.errors import UserError
from minivlm.files import exists, is_folder, make_folder
from minivlm.model.llava import Llava
from weights.layout import by_canonical_name

_PREFIXES = {
    "language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "vision_tower.": "vision_tower.vision_model.",
}
_EXAMPLES = (
    (224, 224),
    (192, 224),
    (224, 192),
    (112, 224),
    (80, 224),
    (224, 112),
    (160, 112),
    (224, 224),
)


def hub_tensors(llava: Llava, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The state dict under the names that LLaVA-NeXT checkpoints have on the hub."""
    renamed = {}
    for name, tensor in by_canonical_name(llava.state_dict(), llava.config.text).items():
        for ours, theirs in _PREFIXES.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        renamed[name] = tensor.detach().to("cpu", dtype).contiguous()
    size = CONFIG["vision_config"]["hidden_size"]
    # Every CLIP checkpoint has this layer; LLaVA does not use it.
    for part, fill in (("weight", torch.ones), ("bias", torch.zeros)):
        renamed[f"vision_tower.vision_model.post_layernorm.{part}"] = fill(size, dtype=dtype)
    return renamed


def _tokenizer_config(special: dict[str, str]) -> dict[str, object]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "image_token": "<image>",
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["text_config"]["max_position_embeddings"],
        "added_tokens_decoder": {
            str(i): {"content": token, **flags, "special": True} for i, token in enumerate(SPECIALS)
        },
    }


def _configs() -> dict[str, dict]:
    """The content of the JSON files, by name."""
    processor = {"processor_class": "LlavaNextProcessor"}
    special = {k: SPECIALS[v] for k, v in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", PAD))}
    tile = CONFIG["vision_config"]["image_size"]
    return {
        "config.json": CONFIG,
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
        "tokenizer_config.json": {**_tokenizer_config(special), **processor},
        "special_tokens_map.json": special,
        "preprocessor_config.json": {
            "image_processor_type": "LlavaNextImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": tile},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": tile, "width": tile},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
            "do_pad": True,
            "image_grid_pinpoints": CONFIG["image_grid_pinpoints"],
            **processor,
        },
        "processor_config.json": {
            "image_token": "<image>",
            "patch_size": CONFIG["vision_config"]["patch_size"],
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            **processor,
        },
    }


def write_examples(folder: Path, seed: int = 0) -> None:
    """Write a few held-out pages as PNG, and `questions.json` with questions about each."""
    folder.mkdir(parents=True, exist_ok=True)
    listing = []
    for i, size in enumerate(_EXAMPLES):
        rng = random.Random(f"examples {seed} {i}")
        page = pages.draw_page(rng, "heldout", size)
        page.image.save(folder / f"page_{i}.png")
        asked = [pages.short_question(rng, f) for f in rng.sample(page.fields, 2)]
        asked += filter(None, [pages.long_question(rng, page, rng.choice(pages.LONG_TYPES))])
        listing.append(
            {
                "image": f"page_{i}.png",
                "questions": [{"question": q.text, "answer": q.answer, "kind": q.type} for q in asked],
            }
        )
    (folder / "questions.json").write_text(json.dumps(listing, indent=1) + "\n")


def check_target(out: Path) -> None:
    """Raise `UserError` unless `out` can become the exported folder without a loss."""
    if not out.name or (exists(out) and not is_folder(out)):
        raise UserError(f"{out}: is no folder that can be replaced")
    if is_folder(out) and any(out.iterdir()) and not exists(out / "config.json"):
        raise UserError(f"{out}: holds something else than a checkpoint (expected a new folder, or one to replace)")


def export(llava: Llava, tokenizer: Tokenizer, out: Path) -> None:
    """Write the folder `out`. The README.md of an existing one is kept.

    The new folder is written beside it and then takes its place, so that `out` is always complete.
    Raises `UserError` for a place that holds something else.
    """
    check_target(out)
    scratch = out.with_name(out.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    make_folder(scratch)
    save_file(hub_tensors(llava), str(scratch / "model.safetensors"), metadata={"format": "pt"})
    (scratch / "model.safetensors").chmod(0o644)
    for name, content in _configs().items():
        (scratch / name).write_text(json.dumps(content, indent=2) + "\n")
    (scratch / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer.save(str(scratch / "tokenizer.json"))
    write_examples(scratch / "pages")
    if (out / "README.md").exists():
        shutil.copy(out / "README.md", scratch / "README.md")
    if out.exists():
        old = out.with_name(out.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(out, old)
        os.replace(scratch, out)
        shutil.rmtree(old)
    else:
        os.replace(scratch, out)
