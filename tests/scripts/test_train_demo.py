"""The demo's training: what it sees, resuming, and the export."""

import json
import random
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import weights
from cli_helpers import Ran, call, refused
from demo_training import command, loop, text
from demo_training.batches import IGNORE, PatchMap, draw_batch, page_tiles
from demo_training.export import export
from demo_training.model import DemoTrainer
from demo_training.optim import Muon, build_optimisers
from eval.demo import pages
from minivlm.generation.sampling import Sampling
from minivlm.model import anyres
from paths import SCRIPTS


@pytest.fixture(scope="module")
def tokenizer():
    return text.build_tokenizer()


@pytest.fixture(scope="module")
def trainer():
    torch.manual_seed(0)
    trainer = DemoTrainer()
    for layer in trainer.llava.language_model.layers:  # zero at the start of training: give them something
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.1)
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.1)
    torch.nn.init.normal_(trainer.llava.lm_head.weight, std=0.1)
    return trainer


@pytest.fixture(scope="module")
def folder(trainer, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "demo"
    export(trainer.llava, tokenizer, out)
    return out


class PlainCausal:
    def attend(self, layer, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def survivors(self, layer):
        return None


@pytest.mark.parametrize("size", [(224, 224), (192, 224), (224, 176), (112, 192), (80, 224), (160, 112)])
def test_a_packed_question_gets_the_logits_it_gets_alone(trainer, tokenizer, size):
    encoder = text.Encoder(tokenizer)
    batch = draw_batch(random.Random(3), trainer.config, encoder, "train", 2, size)
    normed = []
    hook = trainer.llava.language_model.norm.register_forward_hook(lambda module, given, out: normed.append(out))
    with torch.no_grad():
        trainer.answer_losses(batch, encoder.prefix)
        hook.remove()
        packed = trainer.llava.lm_head(normed[0])  # rows with a target, in order
        features = trainer.llava.image_features(trainer.normalise(batch.tiles), [size] * 2)
        where = (batch.targets != IGNORE).nonzero()
        for b, image in enumerate(features):
            assert len(image) == PatchMap(size, trainer.config).count == anyres.image_tokens(size, trainer.config)
            for s in range(int(batch.segment[b].max()) + 1):
                mine = batch.segment[b] == s
                ids = torch.tensor([encoder.prefix + [text.IMAGE] * len(image) + batch.tokens[b, mine].tolist()])
                embeds = trainer.llava.embed(ids, [image])
                hidden = trainer.llava(embeds, torch.arange(ids.shape[1])[None], PlainCausal())
                alone = trainer.llava.lm_head(hidden[0, -int(mine.sum()) :])[batch.targets[b, mine] != IGNORE]
                rows = (where[:, 0] == b) & mine[where[:, 1]]
                torch.testing.assert_close(packed[rows], alone, atol=1e-4, rtol=1e-4)


def test_pointers_hit_the_patch_of_the_next_character(trainer, tokenizer):
    encoder = text.Encoder(tokenizer)
    for size in [(224, 224), (160, 224), (224, 208), (192, 112), (80, 224)]:
        batch = draw_batch(random.Random(4), trainer.config, encoder, "train", 3, size)
        checked = 0
        for b, t, n, patches in batch.pointer.t().tolist():
            character = tokenizer.decode([int(batch.targets[b, t])])
            shown = [pages.CHARACTERS[c - 1] if c > 0 else " " for c in batch.chars[b, n].tolist()]
            if patches == 1:
                assert character in shown
                checked += 1
        assert checked > 50


def test_training_pixels_are_the_processor_s(trainer, folder):
    processor = weights.load(folder).processor
    rng = random.Random(1)
    for size in sorted(set(pages.SIZES)):
        image = pages.draw_page(rng, "train", size).image
        inputs = processor([processor.question("x", 1)], [[image]])
        mine = trainer.normalise(page_tiles(image, trainer.config))
        torch.testing.assert_close(inputs.pixel_values[0, : len(mine)], mine, atol=1e-6, rtol=0)


def test_the_prompt_is_tokenised_as_in_training(folder, tokenizer):
    encoder = text.Encoder(tokenizer)
    processor = weights.load(folder).processor
    page = pages.draw_page(random.Random(2), "train", (80, 224))
    count = PatchMap((80, 224), processor.config).count
    for question in ("What is the due date?", "What is the due date?" + pages.SUFFIX):
        ids = processor([processor.question(question, 1)], [[page.image]]).input_ids[0].tolist()
        assert ids == encoder.prefix + [text.IMAGE] * count + encoder.prompt(text.FIRST_TURN.format(question))
        assert len(ids) - count <= 40
    history = [processor.user_message("the total?", 1), {"role": "assistant", "content": "5"}]
    turn = processor.next_turn(history, processor.user_message("the tax?", 0))
    follow = processor([turn], [[]], continues=True).input_ids[0].tolist()
    assert follow == [text.EOS, *encoder.prompt(text.NEXT_TURN.format("the tax?"))]
    assert tokenizer.decode(encoder.answer("a;\n 7,1")) == "a;\n 7,1"


def test_the_export_is_an_ordinary_checkpoint(folder, trainer):
    vlm = weights.load(folder, dtype="float16" if torch.cuda.is_available() else "float32")
    answer = vlm.ask("What is the total?", [folder / "pages" / "page_0.png"], sampling=Sampling(max_new_tokens=3))
    assert 1 <= len(answer.token_ids) <= 3
    for name, tensor in trainer.llava.state_dict().items():
        assert torch.equal(vlm.model.state_dict()[name], tensor.half().float()), name
    for page in json.loads((folder / "pages" / "questions.json").read_text()):
        with Image.open(folder / "pages" / page["image"]) as image:
            assert image.width <= 224 and len(page["questions"]) >= 2
    assert sum(f.stat().st_size for f in folder.rglob("*")) < 15e6


def test_the_export_in_transformers(folder):
    transformers = pytest.importorskip("transformers")
    model, info = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = transformers.LlavaNextProcessor.from_pretrained(folder, backend="pil")
    image, vlm = Image.open(folder / "pages" / "page_1.png"), weights.load(folder, dtype="float32")
    prompt = vlm.processor.question("What is the date?", 1)
    theirs = processor(images=image, text=prompt, return_tensors="pt")
    mine = vlm.processor([prompt], [[image]])
    assert theirs["input_ids"].tolist() == mine.input_ids.tolist()
    with torch.no_grad():
        expected = model(**theirs).logits
        hidden = vlm.model(
            vlm.model.embed(mine.input_ids, vlm.model.image_features(mine.pixel_values, mine.image_sizes)),
            torch.arange(mine.input_ids.shape[1])[None],
            PlainCausal(),
        )
    torch.testing.assert_close(vlm.model.lm_head(hidden), expected, atol=1e-4, rtol=1e-4)


def test_a_run_resumes_where_it_stopped(tmp_path, monkeypatch):
    run = loop.TrainingRun(tmp_path, torch.device("cpu"), 0)
    run.train(1, 0.01, 2, 1e-3, 1e-3)
    run.train(2, 0.01, 1, 1e-3, 1e-3)
    again = loop.TrainingRun(tmp_path, torch.device("cpu"), 1)
    again.resume()
    assert (again.stage, again.steps, again.elapsed) == (2, run.steps, run.elapsed) and run.steps >= 1
    for mine, theirs in zip(again.trainer.parameters(), run.trainer.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    state = [o.state_dict()["state"] for o in again.optimisers]
    assert all(state) and all("momentum" in s for s in state[0].values())
    again.train(1, 9.0, 1, 1e-3, 1e-3)  # a stage that is over is not repeated
    assert again.steps == run.steps


def test_muon_takes_the_parts_of_a_matrix_apart():
    """q, k and v are one parameter, but three matrices to be orthogonalised."""
    generator = torch.Generator().manual_seed(0)
    rows = (24, 8, 8)
    whole = torch.nn.Parameter(torch.randn(sum(rows), 16, generator=generator))
    whole.grad = torch.randn(sum(rows), 16, generator=generator)
    parts = [torch.nn.Parameter(part.detach().clone()) for part in whole.split(rows)]
    for part, grad in zip(parts, whole.grad.split(rows), strict=True):
        part.grad = grad.clone()
    together, apart = Muon([dict(params=[whole], rows=rows)], lr=0.1), Muon([dict(params=parts, rows=())], lr=0.1)
    for _ in range(3):
        together.step()
        apart.step()
    assert torch.equal(whole, torch.cat(parts))


def test_every_parameter_is_in_one_group(trainer):
    muon, adam = build_optimisers(trainer)
    grouped = [p for optimiser in (muon, adam) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, trainer.parameters()))
    assert {group["rows"] for group in muon.param_groups} == {(), (192, 64, 64), (512, 512)}


def test_schedules():
    assert loop.pointer_weight(0.0) == 1 and loop.pointer_weight(loop.POINTER_GONE) == 0 == loop.pointer_weight(1.0)
    rates = [loop.learning_rate(p / 100) for p in range(101)]
    assert max(rates) == 1 and rates[0] < 0.1 and rates[-1] < 0.05 and rates[50] == 1


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["train", "--run", "{run}", "--resume"], "state.pt: no such file"),
        (["export", "--run", "{run}", "--out", "{run}/x"], "state.pt: no such file"),
        (["train", "--run", "{run}", "--time-budget", "0"], "must be positive"),
        (["train", "--run", "{run}", "--time-budget", "nan"], "'nan' is not a finite number"),
        (["train", "--run", "{run}", "--rate", "-1"], "must be positive"),
        (["train", "--run", "{run}", "--pages", "99999999"], "--pages is 99999999 (expected 1 to 65536)"),
        (["train", "--run", SCRIPTS / "generate.py"], "cannot be"),
        (["export", "--run", "{run}", "--out", SCRIPTS], "holds something else than a checkpoint"),
        (["export", "--run", "{run}", "--out", "/"], "is no folder that can be replaced"),
        (["evaluate", "--batch_size", "0"], "--batch_size is 0"),
        (["evaluate", "--model", "{run}/none"], "none"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, told):
    refused(call(command.main, *(str(argument).format(run=tmp_path) for argument in arguments)), told)


def test_the_script_is_the_command(tmp_path):
    words = [sys.executable, SCRIPTS / "train_demo.py", "train", "--run", tmp_path, "--resume"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    refused(Ran(done.returncode, done.stdout, done.stderr), "state.pt: no such file")


@pytest.mark.parametrize("name, content", [("state.pt", b"junk"), ("state.pt", b""), ("tokenizer.json", b"{")])
def test_a_damaged_run_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(call(command.main, "train", "--run", tmp_path, "--resume"), tmp_path / name)
