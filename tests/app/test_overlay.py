"""The overlay: boxes against what the real image pipeline puts into each token, states, and pictures."""

import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

from minivlm.app.overlay import draw_overlay, token_boxes, token_states
from minivlm.cache.recorder import HELD, NEVER, Recorder
from minivlm.errors import UserError
from minivlm.inputs.images import ImageSettings, pixel_values
from minivlm.model import anyres
from minivlm.model.config import VLMConfig
from minivlm.model.llava import Llava

TILE = 56


def config(family: str, patch: int = 14, **changes) -> VLMConfig:
    raw = {
        "model_type": family,
        "image_token_index": 5,
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", "image_size": TILE, "patch_size": patch},
        **changes,
    }
    if family == "llava_next":
        raw["image_grid_pinpoints"] = [[TILE * a, TILE * b] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    return VLMConfig.from_dict(raw)


def image_settings(model: VLMConfig, size: object = None, **changes) -> ImageSettings:
    """Settings under which a colour channel from 0 to 255 becomes a pixel value from 0 to 1, and padding is black."""
    raw = {"size": size or {"shortest_edge": TILE}, "crop_size": TILE, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    return ImageSettings.from_dict(raw, model, "test", **changes)


def seen(image: Image.Image, model: VLMConfig, settings: ImageSettings) -> torch.Tensor:
    """[N, 3]: the mean colour under each token, from the library's pixel values and packing. NaN: not a patch."""
    pixels = pixel_values([image], settings, model)[0]
    side, patch = model.vision.grid, model.vision.patch_size
    tiles = pixels if model.is_next else pixels[None]  # [tiles, 3, s, s]
    cut = tiles[..., : side * patch, : side * patch].unfold(2, patch, patch).unfold(3, patch, patch)
    means = cut.mean(dim=(-2, -1)).flatten(2).transpose(1, 2)  # [tiles, side², 3]
    if model.is_next:
        packer = SimpleNamespace(config=model, image_newline=torch.full((3,), torch.nan))
        return Llava._pack(packer, means, (image.height, image.width))
    cls = torch.full((int(model.select_strategy == "full"), 3), torch.nan)
    return torch.cat((cls, means[0]))


def ramps(height: int, width: int) -> Image.Image:
    """Red rises with x and green with y, from 0 to 255; blue is 255 everywhere, so that it measures coverage."""
    vertical = Image.linear_gradient("L")  # 256 x 256, black above
    scaled = (
        vertical.resize((width, height), Image.Resampling.BILINEAR),
        vertical.rotate(90).resize((width, height), Image.Resampling.BILINEAR),
    )
    return Image.merge("RGB", (scaled[1], scaled[0], Image.new("L", (width, height), 255)))


def shrunk_area(height: int, width: int, model: VLMConfig) -> float:
    """Pixels of the tiles per pixel of the page."""
    size = (height, width)
    fitted = anyres.fitted_size(size, anyres.best_resolution(size, model.image_grid_pinpoints))
    return fitted[0] * fitted[1] / (height * width)


CROP = config("llava")
NEXT = config("llava_next")
CLASS_TOKEN = config("llava", vision_feature_select_strategy="full")
ODD = config("llava", patch=13)
RIMS = config("llava_next", patch=12)
# Model, settings, and how many pixels of the (finer) view a pixel of a page of (h, w) becomes.
CASES = {
    "crop": (CROP, image_settings(CROP), lambda h, w: (TILE / min(h, w)) ** 2),
    "larger resize, odd patches": (ODD, image_settings(ODD, {"shortest_edge": 75}), lambda h, w: (75 / min(h, w)) ** 2),
    "stretched": (CROP, image_settings(CROP, {"height": TILE, "width": TILE}), lambda h, w: TILE**2 / (h * w)),
    "class token": (CLASS_TOKEN, image_settings(CLASS_TOKEN), lambda h, w: (TILE / min(h, w)) ** 2),
    "padded to a square": (CROP, image_settings(CROP, pad_to_square=True), lambda h, w: (TILE / max(h, w)) ** 2),
    "tiles": (NEXT, image_settings(NEXT), lambda h, w: shrunk_area(h, w, NEXT)),
    "tiles with rims": (RIMS, image_settings(RIMS), lambda h, w: shrunk_area(h, w, RIMS)),
}
SIZES = [(56, 56), (112, 56), (57, 112), (168, 100), (100, 300), (300, 90)]


@pytest.mark.parametrize("name", CASES)
def test_boxes_are_what_the_tokens_see(name):
    model, settings, area_scale = CASES[name]
    rng = random.Random(name)
    for height, width in SIZES + [(rng.randint(40, 260), rng.randint(40, 260)) for _ in range(25)]:
        colours = seen(ramps(height, width), model, settings)
        boxes = token_boxes((height, width), model, settings)
        assert len(boxes) == len(colours) == anyres.image_tokens((height, width), model)
        base = model.vision.grid**2 if model.is_next else 0
        for i, (box, (red, green, blue)) in enumerate(zip(boxes, colours.tolist(), strict=True)):
            if box is None:
                assert not blue > 0.02, (height, width, i)  # NaN, or padding
                continue
            x0, y0, x1, y1 = box
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            scale = TILE**2 / (height * width) if i < base else area_scale(height, width)
            cover = (x1 - x0) * (y1 - y0) * scale / model.vision.patch_size**2
            assert blue == pytest.approx(cover, abs=0.06), (height, width, i)
            if cover > 0.2:  # the mean colour of the page in it is the colour of the box's centre
                middle = pytest.approx((x0 + x1) / 2, abs=0.02 * width + 0.5)
                assert red / blue * width == middle, (height, width, i)
                middle = pytest.approx((y0 + y1) / 2, abs=0.02 * height + 0.5)
                assert green / blue * height == middle, (height, width, i)


@pytest.mark.parametrize("name", CASES)
def test_a_marker_on_the_page_lies_in_the_box_of_the_token_that_sees_it(name):
    model, settings, _ = CASES[name]
    rng, hits = random.Random(name), 0
    for _ in range(40):
        height, width = rng.randint(90, 260), rng.randint(90, 260)
        x, y = rng.randint(4, width - 5), rng.randint(4, height - 5)
        image = Image.new("RGB", (width, height))
        ImageDraw.Draw(image).rectangle((x - 3, y - 3, x + 3, y + 3), fill="white")
        light = seen(image, model, settings).sum(dim=1)
        boxes = token_boxes((height, width), model, settings)
        base = model.vision.grid**2 if model.is_next else 0
        for first, end in ((0, base), (base, len(boxes))):
            lit = [i for i in range(first, end) if light[i] > 0.01]
            assert all(boxes[i] and holds(boxes[i], x, y, -8) for i in lit), (height, width, x, y)
            inside = [i for i in range(first, end) if boxes[i] and holds(boxes[i], x, y, 2)]
            assert len(inside) <= 1
            assert all(light[i] == max(light[lit]) for i in inside), (height, width, x, y)
            hits += len(inside)
    assert hits >= 5


def holds(box: tuple, x: int, y: int, inside: float) -> bool:
    """Whether the middle of pixel (x, y) lies in the box, at least `inside` from its sides."""
    return box[0] + inside <= x + 0.5 <= box[2] - inside and box[1] + inside <= y + 0.5 <= box[3] - inside


def recording() -> Recorder:
    """Two layers, two heads, prompt positions 0 to 7 of which 1 to 6 are vision, and two answer tokens."""
    fate = torch.full((2, 2, 10), HELD, dtype=torch.int16)
    fate[0, :, [1, 2, 3]] = 0
    fate[1, :, [4, 5]] = NEVER
    fate[1, :, 6] = 0
    cores = [(0, [torch.tensor([6, 5]), torch.tensor([1, 2])]), (2, [torch.tensor([4, 6]), torch.tensor([2, 3])])]
    return Recorder(fate, cores, vision_positions=torch.arange(1, 7), interval=2)


def test_states_of_the_cores():
    evicted, secondary, core = token_states(recording()).unbind(dim=1)
    assert evicted.tolist() == [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
    assert core.tolist() == [[0, 0, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0]]
    assert secondary.tolist() == [[0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]
    for step in (0, 1):
        assert token_states(recording(), step)[:, 2].tolist() == [[0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0]]
    assert torch.equal(token_states(recording(), 7), token_states(recording()))
    with pytest.raises(UserError, match="step is -1"):
        token_states(recording(), -1)


def test_states_of_heads_that_evict_apart():
    """A whole-cache policy: what stays counts as core by the share of heads, as it was after the step asked for."""
    fate = torch.tensor([[[-1, 0, 2, -1], [-1, 1, -1, 0]]], dtype=torch.int16)
    recorder = Recorder(fate, vision_positions=torch.tensor([1, 2, 3]))
    assert token_states(recorder, 0)[0].tolist() == [[0.5, 0, 0.5], [0, 0, 0], [0.5, 1, 0.5]]
    assert token_states(recorder, 1)[0, 2].tolist() == [0, 1, 0.5]
    assert token_states(recorder)[0, 2].tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize("model", [CROP, NEXT], ids=["llava", "next"])
def test_pictures(model):
    """Panels of the size stated, the same each time, coloured by the states, and plain where the page is not seen."""
    images = [Image.new("RGB", (120, 60), "white"), Image.new("L", (60, 400), 255)]
    counts = [anyres.image_tokens((image.height, image.width), model) for image in images]
    fate = torch.full((3, 2, 2 + sum(counts)), HELD, dtype=torch.int16)
    vision = torch.arange(1, 1 + sum(counts))
    fate[1, :, vision[: counts[0]]] = 0
    recorder = Recorder(fate, vision_positions=vision)
    picture = draw_overlay(images, model, recorder)
    assert picture.tobytes() == draw_overlay(images, model, recorder, layer_idx=1).tobytes()
    heights = [450, 2000]  # 900 wide, unless that makes a page higher than 2000
    rows = [height + 40 for height in heights for _ in range(2 if model.is_next else 1)]
    assert picture.size == (3 * 24 + 2 * 900, 24 + 64 + sum(rows) + 24 * len(rows))

    mean, layer = (24, 128), (24, 128 + 450 + 64) if model.is_next else (948, 128)  # corners of the first page, twice
    for corner, colour in ((mean, (212, 153, 147)), (layer, (140, 143, 156))):
        pixel = picture.getpixel((corner[0] + 470, corner[1] + 240))
        assert max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= 2
    at_the_rim = picture.getpixel((layer[0] + 100, layer[1] + 240))
    assert (at_the_rim == (255, 255, 255)) == (not model.is_next)  # LLaVA-1.5 crops it away


def test_pictures_of_cores_differ_from_step_to_step():
    page, model = Image.new("RGB", (56, 56), "white"), config("llava", patch=28)
    fate = torch.full((1, 1, 6), HELD, dtype=torch.int16)
    cores = [(0, [torch.tensor([1])]), (3, [torch.tensor([4])])]
    recorder = Recorder(fate, cores, vision_positions=torch.arange(1, 5), interval=3)
    first, last = (draw_overlay([page], model, recorder, step=step) for step in (0, None))
    top, bottom = (24 + 100, 128 + 100), (24 + 800, 128 + 800)
    assert first.getpixel(top) == last.getpixel(bottom) != last.getpixel(top) == first.getpixel(bottom)


def test_refusals():
    page = Image.new("RGB", (56, 56))
    fate = torch.full((2, 1, 20), HELD, dtype=torch.int16)
    recorder = Recorder(fate, vision_positions=torch.arange(16))
    for layer in (-1, 2):
        with pytest.raises(UserError, match=f"--overlay_layer is {layer}, the model has layers 0 to 1"):
            draw_overlay([page], CROP, recorder, layer_idx=layer)
    recorder.vision_positions = torch.arange(15)
    with pytest.raises(ValueError, match=r"15 vision tokens for images of \[16\] tokens"):
        draw_overlay([page], CROP, recorder)
