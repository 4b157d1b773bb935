"""What attention looks at while a model answers: the analysis behind A-VL (AAAI 2025, arXiv 2409.14846), on any pages.

- Concordance: |T1 and T2| / (p · N) of two attention rows over N vision tokens, T the top p · N of each. Between the
  layers of a step it says how alike layers are (the paper: low, heterogeneity), between steps of a layer how fast a
  layer's choice moves (high for near steps, continuity). Two random rows have p.
- Decay: the attention that a text token gets, by its age in text tokens.
- Mass: the shares of attention on system prefix, vision and text, by step.

A row is the mean over all query heads of the attention of a step's last query. Step 0 is the last token of the prompt.
Nothing is evicted: the model runs on the full cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from minivlm.cache import attention
from minivlm.cache.decode_pass import DecodePass
from minivlm.cache.kv_cache import KVCache
from minivlm.cache.policy import Policy
from minivlm.cache.prefill_pass import PrefillPass
from minivlm.cache.ranking import best_first
from minivlm.errors import UserError
from minivlm.generation.sampling import Sampling
from minivlm.generation.vlm import VLM
from minivlm.model.config import TextConfig

CLASSES = ("system", "vision", "text")


@dataclass(frozen=True)
class PageRows:
    """The attention rows of one answer."""

    rows: list[Tensor]  # per step [L, columns]; from step to step one column more
    is_vision: Tensor  # bool [S], of the prompt
    answer: str

    @property
    def system(self) -> int:
        """Tokens before the first vision token."""
        return int(self.is_vision.nonzero()[0])


class WatchedCache(KVCache):
    """A full cache for one sequence that notes, for every step and layer, the attention of the step's last query.

    It keeps the keys of all layers once more, in the order of the tokens, so that it needs to know nothing of slots.
    """

    def __init__(self, config: TextConfig, device: torch.device) -> None:
        super().__init__(config, Policy("full"), device=device)
        self.prefill_pass, self.decode_pass = _WatchedPrefill, _WatchedDecode
        self.attn: list[list[Tensor]] = []  # per step, and per layer [columns]
        self.keys: list[Tensor] = []  # per layer [H_kv, S + steps, D]

    def note(self, layer_idx: int, q: Tensor, k: Tensor) -> None:
        """Note the attention of the last query of q [1, H, S, D], whose step adds the keys k [1, H_kv, S, D]."""
        if layer_idx == 0:
            self.attn.append([])
        prompt = self.sequences[0].length
        first = len(self.attn) == 1
        start, end = (0, prompt) if first else (prompt + len(self.attn) - 2, prompt + len(self.attn) - 1)
        if first:
            self.keys.append(k.new_empty(k.shape[1], prompt + self.max_steps, k.shape[3]))
        self.keys[layer_idx][:, start:end] = k[0]
        visible = torch.tensor([end], device=q.device)
        weights = attention.weights(q[0, :, -1:], self.keys[layer_idx][:, :end], visible)  # [H_kv, 1, end]
        self.attn[-1].append(weights.sum(dim=0)[0] / q.shape[1])


class _WatchedPrefill(PrefillPass):
    state: WatchedCache

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.state.note(layer_idx, q, k)
        return super().attend(layer_idx, q, k, v)


class _WatchedDecode(DecodePass):
    state: WatchedCache

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.state.note(layer_idx, q, k)
        return super().attend(layer_idx, q, k, v)


def watch(vlm: VLM, prompt: str, image: Image.Image, max_new_tokens: int) -> PageRows:
    """Answer one question about one page, greedily, and return every step's rows."""
    inputs = vlm.processor([vlm.processor.question(prompt, 1)], [[image]])
    cache = WatchedCache(vlm.config.text, vlm.device)
    generation = vlm.generate(inputs, cache, Sampling(max_new_tokens))
    for _ in generation:
        pass
    steps = 1 + int(cache.stored[0])  # on a GPU one more may have been started
    rows = [torch.stack(layers).cpu() for layers in cache.attn[:steps]]
    return PageRows(
        rows, inputs.input_ids[0] == vlm.config.image_token_index, vlm.processor.decode(generation.tokens[0])
    )


def concordance(rows: Tensor, share: float) -> Tensor:
    """The concordance index [R, R] of each two of the rows [R, N]: of their top int(share · N), the part they have in common.

    Ties go to the lower index. Raises `UserError` where int(share · N) is 0.
    """
    count = int(share * rows.shape[-1])
    if count < 1:
        raise UserError(f"the top {share:g} of {rows.shape[-1]} vision tokens is not a single one")
    best = best_first(rows.float(), torch.arange(rows.shape[-1]))[..., :count]
    top = torch.zeros(rows.shape).scatter(-1, best, 1.0)
    return top @ top.mT / count


def page_statistics(page: PageRows, shares: Sequence[float], distances: int) -> dict[str, Tensor]:
    """What one page says, float32; NaN where its answer is too short.

    layers [P, L, L]: concordance of layers for each of `shares`, mean over steps.  steps [P, L, distances]: of steps
    1 ... distances apart.  decay [L, T]: attention by age, 0 the token itself.  mass [L, steps, 3] by `CLASSES`.
    """
    vision, steps = page.is_vision.nonzero()[:, 0], len(page.rows)
    seen = torch.stack([row[:, vision] for row in page.rows])  # [steps, L, N]
    across = torch.stack([torch.stack([concordance(step, share) for step in seen]).mean(dim=0) for share in shares])
    along = torch.full((len(shares), seen.shape[1], distances), torch.nan)
    for i, share in enumerate(shares):
        for layer in range(seen.shape[1]):
            index = concordance(seen[:, layer], share)  # [steps, steps]
            for distance in range(1, min(distances, steps - 1) + 1):
                along[i, layer, distance - 1] = index.diagonal(distance).mean()
    by_age, mass = [], []
    for row in page.rows:
        is_text = torch.ones(row.shape[1], dtype=torch.bool)
        is_text[vision] = is_text[: page.system] = False
        text = row[:, is_text]
        by_age.append(text.flip(1))
        parts = (row[:, : page.system].sum(dim=1), row[:, vision].sum(dim=1), text.sum(dim=1))
        mass.append(torch.stack(parts, dim=-1))
    return {
        "layers": across,
        "steps": along,
        "decay": _stacked(by_age).nanmean(dim=0),
        "mass": torch.stack(mass, dim=1),
    }


def statistics(pages: Iterable[PageRows], shares: Sequence[float], distances: int) -> dict[str, Any]:
    """The means over pages, each counting the same, as lists for JSON (None where no answer is long enough).

    Raises `UserError` for shares outside (0, 1], for no pages, and as `concordance`.
    """
    if not all(0 < share <= 1 for share in shares):
        raise UserError(
            f"the shares of top tokens are {', '.join(f'{share:g}' for share in shares)} (expected above 0, up to 1)"
        )
    found, tokens = [], []
    for page in pages:
        found.append(page_statistics(page, shares, distances))
        tokens.append((int(page.is_vision.sum()), len(page.rows)))
    if not found:
        raise UserError("there are no pages to look at")
    layers = found[0]["layers"].shape[-1]
    across, along = (torch.stack([page[name] for page in found]) for name in ("layers", "steps"))
    decay = _stacked([page["decay"] for page in found])  # [pages, L, T]
    mass = _stacked([page["mass"].transpose(1, 2) for page in found])  # [pages, L, 3, steps]
    others = ~torch.eye(layers, dtype=torch.bool)
    return {
        "pages": len(found),
        "layers": layers,
        "vision_tokens": [vision for vision, _ in tokens],
        "steps": [steps for _, steps in tokens],
        "concordance": [
            {
                "share": share,  # also the index of two random rows
                "between_layers": _listed(across[:, i].mean(dim=0)),
                "between_layers_mean": _listed(across[:, i].mean(dim=0)[others].mean()),
                "between_steps": _listed(along[:, i].nanmean(dim=0)),  # [L, distances]
                "between_steps_mean": _listed(along[:, i].nanmean(dim=(0, 1))),
            }
            for i, share in enumerate(shares)
        ],
        "text_decay": {"by_layer": _listed(decay.nanmean(dim=0)), "mean": _listed(decay.nanmean(dim=(0, 1)))},
        "mass": {
            name: {
                "by_step": _listed(mass[:, :, i].nanmean(dim=(0, 1))),
                "by_layer": _listed(mass[:, :, i].nanmean(dim=2).mean(dim=0)),
            }
            for i, name in enumerate(CLASSES)
        },
    }


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors that differ in their last dimension, filled up with NaN."""
    longest = max(tensor.shape[-1] for tensor in tensors)
    return torch.stack([F.pad(tensor, (0, longest - tensor.shape[-1]), value=torch.nan) for tensor in tensors])


def _listed(values: Tensor) -> Any:
    """Nested lists of rounded numbers, None for NaN."""
    if values.ndim:
        return [_listed(value) for value in values]
    return None if values.isnan() else round(float(values), 6)


def draw(stats: dict[str, Any], path: Path) -> None:
    """Heat maps of the layers' concordance, and below them continuity, decay and mass as lines; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    for axes, each in zip(above.subplots(1, len(stats["concordance"]), squeeze=False)[0], stats["concordance"]):
        image = axes.imshow(each["between_layers"], vmin=0, vmax=1, cmap="viridis")
        axes.set_title(f"top {each['share']:.0%}, mean {each['between_layers_mean'] or 0:.2f}")
        axes.set_xlabel("layer")
    above.axes[0].set_ylabel("layer")
    above.colorbar(image, ax=above.axes, label="concordance between layers")

    steps, decay, mass = below.subplots(1, 3).flat
    for i, each in enumerate(stats["concordance"]):
        values = [value for value in each["between_steps_mean"] if value is not None]
        steps.plot(
            range(1, len(values) + 1), values, marker="o", markersize=3, color=f"C{i}", label=f"top {each['share']:.0%}"
        )
        steps.axhline(each["share"], color=f"C{i}", linestyle=":", linewidth=1)
    steps.set(xlabel="steps apart", ylabel="concordance between steps", ylim=(0, 1.02))
    steps.legend(title="dotted: by chance")
    decay.plot(stats["text_decay"]["mean"])
    decay.set(xlabel="age of a text token (text tokens)", ylabel="attention it gets", yscale="log")
    for name in CLASSES:
        mass.plot(stats["mass"][name]["by_step"], label=name)
    mass.set(xlabel="step (0: the prompt's last token)", ylabel="share of attention", ylim=(0, 1.02))
    mass.legend()
    for axes in below.axes:
        axes.grid(alpha=0.3)
    figure.suptitle(f"{stats['pages']} pages, {stats['layers']} layers")
    figure.savefig(path, dpi=150, format="png")
