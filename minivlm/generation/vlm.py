"""A loaded checkpoint that answers: questions about images in, text and statistics out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from PIL import Image
from torch import Tensor

from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policies import preset
from minivlm.cache.recorder import Observer
from minivlm.cache.settings import CacheSettings
from minivlm.errors import UserError
from minivlm.generation.answers import Answer, ImageSource, Request, Stream, stats_of
from minivlm.generation.compile import compiled_blocks, compiled_decode_step, graph_limit
from minivlm.generation.diagnosis import not_finite
from minivlm.generation.generate import Generation
from minivlm.generation.sampling import Sampling
from minivlm.generation.steps import DecodeStep, decode_step
from minivlm.inputs.images import load_image
from minivlm.inputs.processor import ModelInputs, Processor
from minivlm.model.llava import Llava

FULL = preset("full")


class VLM:
    """A model and, unless its folder has no tokenizer, the processor that feeds it.

    With `compiled`, decode steps and the blocks of a prefill go through `torch.compile`: slow the first time, faster
    from then on.
    """

    def __init__(self, model: Llava, processor: Processor | None = None, *, compiled: bool = False) -> None:
        self.model = compiled_blocks(model) if compiled else model
        self.compiled = compiled
        self._eager = model  # on the same parameters
        self._processor = processor
        self._step: DecodeStep = compiled_decode_step(self.device) if compiled else decode_step
        self.config = model.config
        self._spare: KVCache | None = None  # the last batch's buffers, for the next of the same kind

    @property
    def processor(self) -> Processor:
        if self._processor is None:
            raise UserError("this checkpoint has no tokenizer.json, so it cannot read a prompt")
        return self._processor

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

    def ask(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        sampling: Sampling = Sampling(),
        settings: CacheSettings = FULL,
    ) -> Answer:
        """Answer one question. Raises `UserError` for bad images, prompts and settings."""
        return self.ask_batch([Request(prompt, images)], sampling=sampling, settings=settings)[0]

    def ask_batch(
        self, requests: Sequence[Request], *, sampling: Sampling = Sampling(), settings: CacheSettings = FULL
    ) -> list[Answer]:
        """Answer several questions at once; in float32 each gets the answer it would get alone."""
        generation = self._start(requests, sampling, settings)
        for _ in generation:
            pass
        self._spare = generation.cache
        stats = stats_of(generation)
        return [
            Answer(self.processor.decode(tokens), tokens, finish, stats)
            for tokens, finish in zip(generation.tokens, generation.finish, strict=True)
        ]

    def stream(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        sampling: Sampling = Sampling(),
        settings: CacheSettings = FULL,
        observer: Observer | None = None,
    ) -> Stream:
        """Answer piece by piece: iterate over the text, then read `.answer`."""
        return Stream(self.processor, self._start([Request(prompt, images)], sampling, settings, observer))

    def chat(self, *, sampling: Sampling = Sampling(), settings: CacheSettings = FULL) -> Conversation:
        """A conversation that keeps its cache between turns."""
        return Conversation(self, sampling, settings)

    def _start(
        self, requests: Sequence[Request], sampling: Sampling, settings: CacheSettings, observer: Observer | None = None
    ) -> Generation:
        if not requests:
            raise UserError("there is nothing to answer: the batch has no requests")
        images = [[load_image(source) for source in request.images] for request in requests]
        prompts = [
            self.processor.question(request.prompt, len(group)) for request, group in zip(requests, images, strict=True)
        ]
        cache = self.new_cache(settings, [request.sample for request in requests])
        return self.generate(self.processor(prompts, images), cache, sampling, observer)

    def new_cache(self, settings: CacheSettings, samples: Sequence[int] = (0,)) -> KVCache:
        """An empty cache for a batch, in the last batch's buffers where they are free and of the same kind."""
        policy = settings.build(self.config.text.num_hidden_layers)
        spare, self._spare = self._spare, None
        if spare is not None and spare.policy == policy and len(spare.sequences) == len(samples):
            spare.reset(samples)
            return spare
        return KVCache(self.config.text, policy, samples, device=self.device, static=self.compiled)

    @torch.no_grad()
    def image_features(self, pixel_values: Tensor, image_sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Decoder inputs [N_i, C] of each image, as `Llava.image_features`.

        Raises `UserError` for pixel values that are not of the checkpoint's shape, that are complex or not finite, and
        for features that are not finite.
        """
        pixels = self._checked_pixels(pixel_values, image_sizes)
        features = self.model.image_features(pixels, image_sizes)
        if not all(image.isfinite().all() for image in features):
            raise not_finite(self._eager, [], [], lambda: self._eager.image_features(pixels, image_sizes), [])
        return features

    def _checked_pixels(self, pixel_values: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Pixel values of any real type as float32, on the model's device."""
        size, tiles = self.config.vision.image_size, 1 if self.config.is_next else 0
        if pixel_values.ndim != 4 + tiles or tuple(pixel_values.shape[-3:]) != (3, size, size):
            raise UserError(
                f"pixel_values have shape {list(pixel_values.shape)} "
                f"(expected [images, {'tiles, ' * tiles}3, {size}, {size}])"
            )
        if self.config.is_next and len(image_sizes) != len(pixel_values):
            raise UserError(f"image_sizes name {len(image_sizes)} images, pixel_values hold {len(pixel_values)}")
        if pixel_values.is_complex():
            raise UserError(f"pixel_values are complex numbers ({pixel_values.dtype}; expected real ones)")
        pixels = pixel_values.float()
        if not pixels.isfinite().all():
            raise UserError("pixel_values hold NaN or infinity (expected finite numbers)")
        return pixels.to(self.device)

    @torch.no_grad()
    def generate(
        self,
        inputs: ModelInputs,
        cache: KVCache,
        sampling: Sampling,
        observer: Observer | None = None,
        whole: Callable[[], ModelInputs] | None = None,
    ) -> Generation:
        """Prefill a batch of model inputs into `cache` as its next turn; iterate over the result for the tokens.

        Raises `UserError`, here or in an iteration, if the model's numbers are not finite. To find out where they
        become so it needs all inputs so far: in a later turn, `whole` returns them.
        """
        started = time.perf_counter()
        with graph_limit() if self.compiled else nullcontext():
            input_ids, is_vision = inputs.rows()
            return Generation(
                self.model,
                cache,
                input_ids,
                self._features(self.model, inputs),
                sampling,
                observer,
                started,
                self._step,
                is_vision,
                lambda answers: self._not_finite(inputs if whole is None else whole(), answers),
            )

    def _features(self, model: Llava, inputs: ModelInputs) -> list[Tensor]:
        if inputs.pixel_values is None:
            return []
        return model.image_features(self._checked_pixels(inputs.pixel_values, inputs.image_sizes), inputs.image_sizes)

    def _not_finite(self, inputs: ModelInputs, answers: Sequence[Sequence[int]]) -> UserError:
        """Why the model gives no finite numbers for these inputs, followed by their answers so far."""
        return not_finite(self._eager, *inputs.rows(), lambda: self._features(self._eager, inputs), answers)


class Conversation:
    """Turns in one cache: what was said is neither computed nor tokenised again.

    A turn that is refused, or interrupted before its answer begins, is forgotten and the conversation can go on. Where
    the cache was left half changed, the next turn computes the whole conversation anew, from its tokens: the text of an
    answer is never read again as a prompt.
    """

    def __init__(self, vlm: VLM, sampling: Sampling, settings: CacheSettings) -> None:
        self.vlm, self.sampling = vlm, sampling
        self.cache = vlm.new_cache(settings)
        self.messages: list[dict] = []
        self.images: list[Image.Image] = []  # of all turns
        self._ids = torch.zeros(0, dtype=torch.int64)  # all that was said, image tokens included
        self._is_vision = torch.zeros(0, dtype=torch.bool)  # which of them are image tokens
        self._last: Generation | None = None  # the turn that the cache ends with; None: nothing in it is of use

    def ask(self, prompt: str, images: Sequence[ImageSource] = ()) -> Stream:
        """The answer to the next turn, as a stream; iterate over it before the next `ask`.

        Raises `UserError` if the turn leaves the model's context, and for bad images.
        """
        processor = self.vlm.processor
        loaded = [load_image(source) for source in images]
        message = processor.user_message(prompt, len(loaded))
        self._close_turn()
        text = processor.next_turn(self.messages, message) if self.messages else processor.render([message])
        turn = processor([text], [loaded], continues=bool(self.messages))
        held = self._held()
        # The template's end of a turn may be what the answer ended with; it is said once.
        said = len(self._ids)
        if said > held and torch.equal(self._ids[-1:], turn.input_ids[0, :1]):
            said -= 1
        ids = torch.cat((self._ids[:said], turn.input_ids[0]))
        is_vision = torch.cat((self._is_vision[:said], turn.is_vision[0]))
        all_images = [*self.images, *loaded]

        def whole() -> ModelInputs:
            return ModelInputs.of_rows([ids], [is_vision], *processor.pixels(all_images))

        if held:
            inputs = ModelInputs.of_rows([ids[held:]], [is_vision[held:]], turn.pixel_values, turn.image_sizes)
        else:
            self.cache.reset([0])
            inputs = whole()
        self._check_room(held or said, len(ids))
        turns = self.cache.num_turns
        last, self._last = self._last, None  # an interrupted prefill leaves the cache half changed,
        try:
            self._last = self.vlm.generate(inputs, self.cache, self.sampling, whole=whole)
        except UserError:
            if self.cache.num_turns == turns:  # a refused one leaves it as it was
                self._last = last
            raise
        self.messages = [*self.messages, message]
        self.images = all_images
        self._ids, self._is_vision = ids, is_vision
        return Stream(processor, self._last)

    def _close_turn(self) -> None:
        """Note the last answer, as far as it was read."""
        if self._last is None:
            return
        if self.messages[-1]["role"] == "user":
            answer = torch.tensor(self._last.tokens[0], dtype=torch.int64)
            self._ids = torch.cat((self._ids, answer))
            self._is_vision = torch.cat((self._is_vision, torch.zeros(len(answer), dtype=torch.bool)))
            text = self.vlm.processor.decode(self._last.tokens[0])
            self.messages = [*self.messages, {"role": "assistant", "content": text}]
        if not self._last.intact:
            self._last = None

    def _held(self) -> int:
        """How many tokens of what was said the cache holds."""
        return 0 if self._last is None else self.cache.sequences[0].length + int(self.cache.stored[0])

    def _check_room(self, before: int, length: int) -> None:
        limit = self.vlm.config.text.context_length
        if length > limit:
            raise UserError(
                f"the conversation is {before} tokens long and this turn takes {length - before}, "
                f"the model's context is {limit} (expected a shorter turn, or a new conversation)"
            )
