"""From images and text to model inputs, and from tokens back to text.

The results are those of transformers' `LlavaProcessor` and `LlavaNextProcessor`. The method differs
in one point: each `<image>` placeholder is expanded in the *ids*, to as many image tokens as
`anyres.image_tokens` says, so that the processor and the model count with the same function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minivlm.errors import UserError
from minivlm.inputs.images import ImageSettings, load_image, pixel_values
from minivlm.inputs.plain_text import control_tokens, plain_text, role_markers
from minivlm.inputs.processor_files import ProcessorFile, image_settings, template_source
from minivlm.inputs.templates import BUILT_IN, ChatTemplate, built_in
from minivlm.inputs.token_settings import TokenSettings
from minivlm.inputs.tokenizer import Streamer, load_tokenizer
from minivlm.model import anyres
from minivlm.model.config import VLMConfig

_ANSWER = "\ue000minivlm-answer\ue001"  # stands for an answer; unlike anything in a text or template


@dataclass(frozen=True)
class ModelInputs:
    """A batch of prompts for the model. In sequence b, padding begins at position `lengths[b]`."""

    input_ids: Tensor  # [B, S] int64, right-padded, one id per image token
    is_vision: Tensor  # [B, S] bool, where image tokens stand; ids do not tell, because a model can generate one too
    lengths: Tensor  # [B] int64
    pixel_values: Tensor | None  # float32, as `images.pixel_values` makes them; None without images
    image_sizes: list[anyres.Size]  # (height, width) of each image, in prompt order

    @classmethod
    def of_rows(
        cls,
        input_ids: Sequence[Tensor],
        is_vision: Sequence[Tensor],
        pixel_values: Tensor | None,
        image_sizes: list[anyres.Size],
    ) -> ModelInputs:
        """The batch of sequences [S], each with the bool mask [S] of its image tokens."""
        ids, mask = (pad_sequence(list(rows), batch_first=True) for rows in (input_ids, is_vision))
        return cls(ids, mask, torch.tensor([len(row) for row in input_ids]), pixel_values, image_sizes)

    def rows(self) -> tuple[list[Tensor], list[Tensor]]:
        """The ids [S] and the masks [S] of each sequence, without padding."""
        lengths = self.lengths.tolist()
        ids, masks = (
            [row[:length] for row, length in zip(padded, lengths, strict=True)]
            for padded in (self.input_ids, self.is_vision)
        )
        return ids, masks


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
        around_text = tokenizer.encode("").tokens  # what the post-processor adds to every text
        self._bos = around_text[0] if around_text else None

    @classmethod
    def from_folder(cls, folder: str | Path, config: VLMConfig, *, pad_to_square: bool | None = None) -> Processor:
        """Read a checkpoint folder's tokenizer, chat template and image settings.

        `pad_to_square` (LLaVA-1.5 only) pads images with the mean colour instead of cropping them;
        with None, the checkpoint decides. Raises `UserError`, naming the file and the key at fault.
        """
        folder = Path(folder)
        file = ProcessorFile.from_folder(folder)
        tokens = TokenSettings.from_folder(folder).texts
        tokenizer = load_tokenizer(folder)
        vocabulary = tokenizer.get_vocab()
        image_token = tokens.get("image_token") or file.image_token_text or "<image>"
        _check_ids(folder, tokenizer, vocabulary, image_token, config)
        source, name = template_source(folder, file)
        if source is None:
            built_in_name = built_in(config, vocabulary)
            source = BUILT_IN[built_in_name]
            name = f"built-in template {built_in_name}"
        template = ChatTemplate(source, name, image_token, tokens)
        return cls(tokenizer, template, image_settings(folder, file, config, pad_to_square), config, image_token)

    def render(self, messages: Sequence[Mapping]) -> str:
        """The prompt for the assistant's next answer, as the chat template writes it.

        A message is `{"role": "user", "content": ...}`. Its content is a text, which may contain
        `<image>`, or a list of `{"type": "image"}` and `{"type": "text", "text": ...}`.
        """
        return self.template.render(messages)

    def question(self, text: str, num_images: int = 0, history: Sequence[Mapping] = ()) -> str:
        """The rendered prompt of one user turn; `user_message` says where its images stand."""
        return self.render([*history, self.user_message(text, num_images)])

    def user_message(self, text: str, num_images: int = 0) -> dict:
        """A user's message. Images come first, unless `<image>` in the text marks their places.

        Raises `UserError` for a text that is not valid Unicode or cannot fit the model's context.
        """
        self._expect_text(text)
        images = 0 if self.image_token in text else num_images
        return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}

    def plain_text(self, text: str) -> str:
        """The text with a space in all that would be more than text: for text that strangers write.

        What comes back has no control token (`</s>`, `<image>`, `<|im_start|>`) in any spelling
        that the tokenizer takes for one, and no role marker as the chat template writes it (`USER:`,
        `[INST]`): `</s>` becomes `</s >`. By itself it encodes to ids of ordinary text alone, the id
        of unknown characters included. A text that has none of this comes back as it is.

        This keeps certain only that control tokens are the template's own. Role markers are ordinary
        text to tokenizer and model, and a model may take other spellings of them, or a sentence that
        asks for it, for a turn. Raises `UserError` as `user_message` does.
        """
        self._expect_text(text)
        return plain_text(text, self.tokenizer, {self.image_token, *self._role_markers})

    def next_turn(self, history: Sequence[Mapping], message: Mapping) -> str:
        """The text that follows an answer in a conversation, up to where the next answer begins.

        `history` ends with the assistant's answer. The cache holds its tokens as they were
        generated, so it is not tokenised again; only what comes after it is. That begins with the
        marker with which the template ends a turn, which is why an end-of-sequence token that ended
        the answer must not have entered the cache. Call the processor on the text with
        `continues=True`.

        Raises `UserError` if the template renders the earlier turns differently once there is a
        later one.
        """
        if not history or history[-1].get("role") != "assistant":
            raise UserError("the history of a conversation must end with an answer of the assistant")
        prompt = self.render(history[:-1])
        whole = self.render([*history[:-1], {"role": "assistant", "content": _ANSWER}, message])
        # A template may put white space between its prompt and the answer, but must not change the
        # prompt. In that, a user may have written anything.
        before, marker, after = whole[len(prompt) :].partition(_ANSWER)
        if not marker or not whole.startswith(prompt) or before.strip():
            raise UserError("the chat template rewrites earlier turns, so a conversation cannot go on from its cache")
        return after

    def __call__(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image | Path | str]], *, continues: bool = False
    ) -> ModelInputs:
        """Rendered prompts with `<image>` placeholders, and the images of each -> model inputs.

        `continues` marks texts that follow tokens already in a cache: they get no BOS and no word
        boundary at their beginning. Raises `UserError` for an image that cannot be read, if images
        and placeholders differ in number, for a prompt that is not valid Unicode, and for one longer
        than the model's context (image tokens are never cut off).
        """
        if len(prompts) != len(images):
            raise UserError(f"{len(prompts)} prompts came with {len(images)} lists of images")
        loaded = [[load_image(image) for image in group] for group in images]
        limit = self.config.text.context_length
        rows, masks = [], []
        for prompt, group in zip(prompts, loaded, strict=True):
            self._expect_text(prompt)
            ids = self._continued(prompt) if continues else self._encoded(prompt)
            placeholders = ids.count(self.config.image_token_index)
            if placeholders != len(group):
                raise UserError(
                    f"the prompt has {placeholders} {self.image_token} placeholders for {len(group)} images"
                )
            row, mask = self._expanded(ids, group)
            if len(row) > limit:
                raise UserError(f"the prompt takes {len(row)} tokens, the model's context is {limit}")
            rows.append(row)
            masks.append(mask)
        return ModelInputs.of_rows(rows, masks, *self.pixels([image for group in loaded for image in group]))

    def pixels(self, images: Sequence[Image.Image]) -> tuple[Tensor | None, list[anyres.Size]]:
        """The `pixel_values` and `image_sizes` of the images of all prompts, in order."""
        sizes = [(image.height, image.width) for image in images]
        return pixel_values(images, self.image_settings, self.config) if images else None, sizes

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def streamer(self) -> Streamer:
        """A new decoder for tokens that arrive one at a time."""
        return Streamer(self.tokenizer)

    def _expect_text(self, text: str) -> None:
        """Raise `UserError` for what need not be encoded to know that it is no prompt."""
        limit = self.config.text.context_length
        if len(text) > limit and len(text) > limit * self._longest_token:  # encoding 10 MB would take seconds
            raise UserError(f"the prompt has {len(text)} characters, the model's context is {limit} tokens")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # so bytes on a command line that are not text reach us
            raise UserError(f"the prompt is not valid Unicode (character {error.start + 1})") from None

    @cached_property
    def _longest_token(self) -> int:
        """The most characters that one token can stand for."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def _role_markers(self) -> set[str]:
        """What the chat template writes around turns."""
        turns = [{"role": role, "content": _ANSWER} for role in ("user", "assistant", "user")]
        _, *between = self.render(turns).split(_ANSWER)
        return role_markers(between, control_tokens(self.tokenizer))

    def _encoded(self, text: str) -> list[int]:
        """Ids of a text, with BOS if the tokenizer has one."""
        # If the template has written BOS itself, the post-processor must not add a second one.
        has_bos = self._bos is not None and text.startswith(self._bos)
        return self.tokenizer.encode(text, add_special_tokens=not has_bos).ids

    def _continued(self, text: str) -> list[int]:
        """Ids of a text in the middle of another."""
        # A tokenizer treats the beginning of a text differently, so the text is encoded after a
        # character, whose ids are then cut off. Where a line break would merge with the text's own
        # first character, a zero byte does not.
        for before in ("\n", "\0"):
            opening = self.tokenizer.encode(before, add_special_tokens=False).ids
            ids = self.tokenizer.encode(before + text, add_special_tokens=False).ids
            if ids[: len(opening)] == opening:
                return ids[len(opening) :]
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _expanded(self, ids: Sequence[int], images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Ids [S] with each placeholder repeated as often as its image has tokens, and the mask [S] of these."""
        short = torch.tensor(ids, dtype=torch.int64)
        is_placeholder = short == self.config.image_token_index
        repeats = torch.ones_like(short)
        counts = [anyres.image_tokens((image.height, image.width), self.config) for image in images]
        repeats[is_placeholder] = torch.tensor(counts, dtype=torch.int64)
        return short.repeat_interleave(repeats), is_placeholder.repeat_interleave(repeats)


def _check_ids(
    folder: Path, tokenizer: Tokenizer, vocabulary: Mapping[str, int], image_token: str, config: VLMConfig
) -> None:
    """Refuse a tokenizer that means another image token than the model, or has ids that the model has not."""
    image_id = vocabulary.get(image_token)
    if image_id != config.image_token_index:
        raise UserError(
            f"{folder}: the tokenizer's id of {image_token} is {image_id}, "
            f"config.json's image_token_index is {config.image_token_index}"
        )
    largest = max([*vocabulary.values(), *tokenizer.encode("").ids])  # the latter need not be in the vocabulary
    if largest >= config.text.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has the id {largest}, config.json's vocab_size is {config.text.vocab_size}"
        )
