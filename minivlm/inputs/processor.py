"""Images and text -> model inputs: chat template, tokenizer, image placeholders, pixel values; and back to text.

Follows transformers' `LlavaProcessor` and `LlavaNextProcessor`, with one difference in method: each
`<image>` placeholder is expanded in the *ids*, to as many image tokens as `anyres.image_tokens` says,
so that the processor and the model's packing count with the same function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from minivlm.errors import UserError
from minivlm.inputs.images import ImageSettings, load_image, pixel_values
from minivlm.inputs.templates import BUILT_IN, ChatTemplate, built_in
from minivlm.inputs.tokenizer import Streamer, load_tokenizer, read_json, special_tokens
from minivlm.model import anyres
from minivlm.model.config import VLMConfig

_ANSWER = "\ue000minivlm-answer\ue001"  # stands for an answer; no text and no template contains it


@dataclass(frozen=True)
class ModelInputs:
    """A batch of prompts for the model. Positions from `lengths[b]` on are padding."""

    input_ids: Tensor  # [B, S] int64, right-padded, one id per image token
    lengths: Tensor  # [B] int64
    pixel_values: Tensor | None  # float32, [I, 3, s, s] or for LLaVA-NeXT [I, tiles, 3, s, s]; None without images
    image_sizes: list[anyres.Size]  # (height, width) of each image, in prompt order


class Processor:
    """Everything between a user's text and images and a model's tensors."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        image_settings: ImageSettings,
        config: VLMConfig,
        image_token: str,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.image_settings = image_settings
        self.config = config
        self.image_token = image_token
        self._pad_id = int(config.image_token_index == 0)  # any id but the image's: padding is never attended to
        opening = tokenizer.encode("").tokens  # what the post-processor puts around a text
        self._bos = opening[0] if opening else None

    @classmethod
    def from_folder(cls, folder: str | Path, config: VLMConfig, *, pad_to_square: bool | None = None) -> Processor:
        """Read a checkpoint folder's tokenizer, chat template and image settings.

        `pad_to_square` (LLaVA-1.5 only) pads images with the mean colour instead of cropping them; None
        means what the checkpoint says.  Raises `UserError` naming the file and key at fault.
        """
        folder = Path(folder)
        nested = read_json(folder / "processor_config.json")
        tokens = special_tokens(folder)
        tokenizer = load_tokenizer(folder)
        image_token = tokens.get("image_token") or nested.get("image_token") or "<image>"
        found = tokenizer.token_to_id(image_token)
        if found != config.image_token_index:
            raise UserError(
                f"{folder}: the tokenizer's id of {image_token} is {found}, "
                f"config.json's image_token_index is {config.image_token_index}"
            )
        source, name = _template_source(folder, nested)
        if source is None:
            name = built_in(config, tokenizer.get_vocab())
            source, name = BUILT_IN[name], f"built-in template {name}"
        template = ChatTemplate(source, name, image_token, tokens)
        return cls(tokenizer, template, _image_settings(folder, nested, config, pad_to_square), config, image_token)

    def render(self, messages: Sequence[Mapping]) -> str:
        """The prompt for the assistant's next answer, by the chat template.

        A message is `{"role": "user", "content": ...}`, the content a text, in which `<image>` may stand, or
        a list of `{"type": "image"}` and `{"type": "text", "text": ...}`.
        """
        return self.template.render(messages)

    def question(self, text: str, num_images: int = 0, history: Sequence[Mapping] = ()) -> str:
        """The rendered prompt of one user turn: images first, unless the text says where they stand."""
        return self.render([*history, self.user_message(text, num_images)])

    def user_message(self, text: str, num_images: int = 0) -> dict:
        """A user's message with its images first, unless `<image>` in the text says where they stand.

        Raises `UserError` for a text that is none: a command line's stray bytes become characters no tokenizer takes.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is not valid Unicode (character {error.start + 1})") from None
        images = 0 if self.image_token in text else num_images
        return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}

    def next_turn(self, history: Sequence[Mapping], message: Mapping) -> str:
        """The text that follows an answer in a conversation, up to where the next answer begins.

        `history` ends with the assistant's answer, whose tokens the cache holds as they were generated; it is
        neither rendered nor tokenised again.  The text begins right behind the answer, so it holds the marker
        with which the template ends a turn: an end-of-sequence token that ended the answer must not have
        entered the cache.  Call the processor on it with `continues=True`.
        """
        if not history or history[-1].get("role") != "assistant":
            raise UserError("the history of a conversation must end with an answer of the assistant")
        prompt = self.render(history[:-1])
        whole = self.render([*history[:-1], {"role": "assistant", "content": _ANSWER}, message])
        before, found, after = whole.partition(_ANSWER)
        if not found or not before.startswith(prompt) or before[len(prompt) :].strip():
            raise UserError("the chat template rewrites earlier turns, so a conversation cannot go on from its cache")
        return after

    def __call__(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image | Path | str]], *, continues: bool = False
    ) -> ModelInputs:
        """Rendered prompts with `<image>` placeholders, and the images of each (or their files), in order -> model inputs.

        `continues` marks texts that go on behind tokens already in a cache: no BOS, no word boundary of a
        text's beginning.  Raises `UserError` for an image that cannot be read, where images and placeholders
        differ in number, and for a prompt longer than the model's context: image tokens are never cut.
        """
        if len(prompts) != len(images):
            raise UserError(f"{len(prompts)} prompts came with {len(images)} lists of images")
        flat = [load_image(image) for group in images for image in group]
        sizes = [(image.height, image.width) for image in flat]
        counts = iter([anyres.image_tokens(size, self.config) for size in sizes])
        rows = []
        for prompt, group in zip(prompts, images):
            ids = self._continued(prompt) if continues else self._encoded(prompt)
            places = ids.count(self.config.image_token_index)
            if places != len(group):
                raise UserError(f"the prompt has {places} {self.image_token} placeholders for {len(group)} images")
            rows.append(
                [token for i in ids for token in [i] * (next(counts) if i == self.config.image_token_index else 1)]
            )
        lengths = [len(row) for row in rows]
        limit = self.config.text.context_length
        if max(lengths, default=0) > limit:
            raise UserError(f"the prompt takes {max(lengths)} tokens, the model's context is {limit}")
        padded = [row + [self._pad_id] * (max(lengths) - len(row)) for row in rows]
        return ModelInputs(
            input_ids=torch.tensor(padded, dtype=torch.int64),
            lengths=torch.tensor(lengths, dtype=torch.int64),
            pixel_values=pixel_values(flat, self.image_settings, self.config) if flat else None,
            image_sizes=sizes,
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones skipped."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def streamer(self) -> Streamer:
        """A decoder for tokens that come one at a time."""
        return Streamer(self.tokenizer)

    def _encoded(self, text: str) -> list[int]:
        # A template may write BOS itself; the post-processor must not add a second one.
        doubled = self._bos is not None and text.startswith(self._bos)
        return self.tokenizer.encode(text, add_special_tokens=not doubled).ids

    def _continued(self, text: str) -> list[int]:
        """Ids of a text in the middle of another: encoded behind a character that is then cut off again."""
        for before in ("\n", "\0"):  # the second where a line break merges with the text
            opening = self.tokenizer.encode(before, add_special_tokens=False).ids
            ids = self.tokenizer.encode(before + text, add_special_tokens=False).ids
            if ids[: len(opening)] == opening:
                return ids[len(opening) :]
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def _template_source(folder: Path, nested: Mapping) -> tuple[str | None, str]:
    """(source, file name) of the checkpoint's chat template, in the order in which transformers looks."""
    if nested.get("chat_template") is not None:
        return _default(nested["chat_template"], folder / "processor_config.json"), "processor_config.json"
    legacy = read_json(folder / "chat_template.json")
    if legacy:
        return _default(legacy.get("chat_template"), folder / "chat_template.json"), "chat_template.json"
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), path.name
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as text ({error})") from None
    found = read_json(folder / "tokenizer_config.json").get("chat_template")
    return None if found is None else _default(found, folder / "tokenizer_config.json"), "tokenizer_config.json"


def _default(found: object, path: Path) -> str:
    """A template is a string, or several with names, of which `default` is used."""
    if isinstance(found, list):
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, Mapping)}
    if isinstance(found, Mapping):
        found = found.get("default")
    if not isinstance(found, str):
        raise UserError(f"{path}: chat_template is not a text and has no default one")
    return found


def _image_settings(folder: Path, nested: Mapping, config: VLMConfig, pad_to_square: bool | None) -> ImageSettings:
    """New checkpoints nest the image processor in `processor_config.json`; old ones have `preprocessor_config.json`."""
    name, raw = "processor_config.json: image_processor", nested.get("image_processor")
    if raw is None:
        name, raw = "preprocessor_config.json", read_json(folder / "preprocessor_config.json")
    if not isinstance(raw, Mapping) or not raw:
        expected = "expected preprocessor_config.json, or image_processor in processor_config.json"
        raise UserError(f"{folder}: no image settings ({expected})")
    return ImageSettings.from_dict(raw, config, name, pad_to_square)
