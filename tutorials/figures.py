"""Every picture of the lessons, drawn from the project's own objects.

python -m tutorials.figures          redraws all of them into tutorials/figures/
"""

import io
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import PIL
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from yojo import Processor, load_backbone
from yojo.cli import WEIGHTS
from yojo.core.config import ImageConfig
from yojo.core.data import collate
from yojo.core.grpo import GrpoConfig
from yojo.core.image import images_to_patches
from yojo.core.mask import MODES
from yojo.core.molmo2 import rotary_angles, rotate
from yojo.drawing import draw_mask, readable
from yojo.metrics import interval_over_seeds, mean, tau_b
from yojo.settings import read_image_config
from yojo.tiny import world
from yojo.tiny.experiment import TITLES
from yojo.tiny.studies import JUDGES, MIXED
from yojo.votes import METHODS, simulate

FOLDER, RUNS = Path(__file__).parent / "figures", Path(__file__).parent / "runs"
# Told apart by lightness and by dashes as well as by hue, so that a print in grey can be read.
LINES = [
    {"color": "#1b4f8f", "linestyle": "-"},
    {"color": "#e08214", "linestyle": "--"},
    {"color": "#2e7d54", "linestyle": ":"},
    {"color": "#b49ad6", "linestyle": "-."},
    {"color": "#222222", "linestyle": (0, (6, 2, 1, 2, 1, 2))},
]

# ------------------------------------------------------------------------------------------------- drawing with axes


def _axes(width: float, height: float, columns: int = 1, **about) -> tuple[Figure, list[Axes]]:
    """A white sheet, sizes in inches, with axes side by side. Opaque, so that it reads the same on a dark page."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    return figure, list(figure.subplots(1, columns, squeeze=False, **about)[0])


def _picture(figure: Figure) -> Image.Image:
    file, numbers = io.BytesIO(), []
    figure.savefig(file, format="png")
    texts = [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    for axes in figure.axes:
        for line in axes.lines:
            numbers += [*line.get_xdata(), *line.get_ydata()]
        numbers += [n for box in axes.patches if isinstance(box, Rectangle) for n in box.get_bbox().bounds]
        for image in map(np.asarray, (image.get_array() for image in axes.images)):
            numbers += [*image.mean(0).ravel(), *image.mean(1).ravel()]
    return _remember(Image.open(file).convert("RGB"), numbers, texts)


def _remember(picture: Image.Image, numbers: Iterable[float], texts: Sequence[str]) -> Image.Image:
    """Keep beside the pixels what they show: a changed digit is a few pixels, and another font is many."""
    versions = f"matplotlib {matplotlib.__version__}, Pillow {PIL.__version__}"
    shown = {"numbers": [float(f"{float(n):.6g}") for n in numbers], "texts": list(texts), "drawn by": versions}
    picture.info["shown"] = json.dumps(shown, ensure_ascii=False)
    return picture


def save(picture: Image.Image, path: Path) -> None:
    text = PngInfo()
    text.add_itxt("shown", picture.info["shown"], zip=True)
    picture.save(path, pnginfo=text)


def _plot(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Names, and no more frame than needed."""
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _smooth(values: list[float], width: int) -> list[float]:
    """Each value's mean with those up to `width` steps away."""
    return [mean(values[max(0, i - width) : i + width + 1]) for i in range(len(values))]


def _curve(axes, log: list[dict], key: str, width: int, label: str, line: dict) -> None:
    steps, values = [e["step"] for e in log], [e[key] for e in log]
    axes.plot(steps, values, color=line["color"], linewidth=0.6, alpha=0.4)
    axes.plot(steps, _smooth(values, width), label=label, **line)


# ------------------------------------------------------------------------------------------------- lessons 00 and 01


def scene() -> Image.Image:
    """The picture that lesson 00 judges answers about, four times its size."""
    scene = world.make_scene(random.Random(0))
    picture = world.render(scene)
    large = picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.NEAREST)
    return _remember(
        large, np.asarray(picture).mean(0).ravel(), [world.describe(scene.facts(thing)) for thing in scene.things]
    )


def tiling() -> Image.Image:
    """Which crop owns which patch of a picture of 600 x 400, by the pooling indices, and how far two crops reach."""
    c = ImageConfig()
    seen = images_to_patches([Image.new("RGB", (600, 400))], c)
    global_rows, global_columns, rows, columns = seen.grids[0]
    (h, w), crops = c.pooling, seen.pooling[global_rows * global_columns :] // c.side**2 - 1
    owner = crops.view(rows, columns, h, w).permute(0, 2, 1, 3).reshape(rows * h, columns * w)
    figure, (axes,) = _axes(5.6, 5.6)
    axes.imshow(owner, cmap="Greys", vmin=-1, vmax=8)
    axes.set_xticks([i - 0.5 for i in range(columns * w)], minor=True)
    axes.set_yticks([i - 0.5 for i in range(rows * h)], minor=True)
    axes.grid(which="minor", color="#bbbbbb", linewidth=0.4)
    axes.tick_params(which="both", length=0)
    step, own = c.side - sum(c.margins), c.side - c.margins[1]
    marks = [0, step, own, c.side, columns * w]
    axes.set_xticks([m - 0.5 for m in marks], marks)
    axes.set_yticks([m - 0.5 for m in marks], marks)
    for crop in range(int(owner.max()) + 1):
        middle = [(owner == crop).nonzero()[:, i].float().mean().item() for i in (1, 0)]
        axes.text(*middle, f"crop {crop}\nowns these", ha="center", va="center", fontsize=11)
    for crop, line in ((0, LINES[0]), (3, LINES[1])):
        y, x = (step * i - 0.5 for i in divmod(crop, 2))
        axes.add_patch(Rectangle((x, y), c.side, c.side, fill=False, edgecolor=line["color"], linewidth=3, zorder=5))
        label = {"color": line["color"], "fontsize": 10, "ha": "center", "backgroundcolor": "white", "zorder": 6}
        axes.text(x + c.side / 2, y + (2 if crop == 0 else c.side - 2), f"what the tower reads as crop {crop}", **label)
    axes.set_xlabel(
        f"{columns * w} x {rows * h} patches; shades: which crop owns a patch;\n"
        f"frames: the {c.side} x {c.side} of crops 0 and 3, which share the middle {c.side - step} x {c.side - step}"
    )
    return _picture(figure)


def windows() -> Image.Image:
    """The tiny scene's overview with its patches, and the tokens that its windows become."""
    c, picture = read_image_config(WEIGHTS / "tiny"), world.render(world.make_scene(random.Random(0)))
    pooling = images_to_patches([picture], c).pooling
    figure, (axes,) = _axes(4.6, 4.6)
    axes.imshow(picture, alpha=0.75)
    axes.set(xticks=[], yticks=[])
    for patch in range(c.side**2):
        y, x = (c.patch * i for i in divmod(patch, c.side))
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), c.patch, c.patch, fill=False, edgecolor="white", linewidth=0.8))
        axes.text(x + c.patch / 2, y + c.patch / 2, str(patch), ha="center", va="center", fontsize=8)
    for token, window in enumerate(pooling[: (c.side // 2) ** 2]):
        y, x = (c.patch * i for i in divmod(int(window[0]), c.side))
        size = 2 * c.patch
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), size, size, fill=False, edgecolor="black", linewidth=2.5))
        box = {"facecolor": "white", "edgecolor": "black", "pad": 3}
        axes.text(x + size / 2, y + size / 2, f"token {token}", ha="center", va="center", fontsize=9, bbox=box)
    axes.set_xlabel("the overview; small numbers: patches; boxes: windows of 2 x 2")
    return _picture(figure)


# ------------------------------------------------------------------------------------------------------ lesson 02


def network() -> Image.Image:
    """The parts in a row, with the shapes that hooks saw in a real pass."""
    picture = world.render(world.make_scene(random.Random(0)))
    model = load_backbone(WEIGHTS / "tiny")
    row = Processor.from_folder(WEIGHTS / "tiny", max_tokens=4096).encode("What colour is the cross?", [], picture)
    pictures, eyes, decoder = row.pictures, model.model.vision_backbone, model.model.transformer
    parts = {
        "patch_embedding": eyes.image_vit.patch_embedding,
        "tower": eyes.image_vit,
        "pooling": eyes.image_pooling_2d,
        "projector": eyes.image_projector,
        "table": decoder.wte,
        "blocks": decoder.blocks[-1],
    }
    shape = {}
    for name, part in parts.items():
        part.register_forward_hook(lambda m, a, out, n=name: shape.update({n: out[0] if n == "tower" else out}))
    with torch.no_grad():
        model(row.ids[None], features=model.encode_images(pictures))
    size = {name: " x ".join(map(str, out.shape)) for name, out in shape.items()}
    upper = [
        f"patches\n{' x '.join(map(str, pictures.patches.shape))}",
        f"patch embedding\n+ position\n{size['patch_embedding']}",
        f"{len(eyes.image_vit.transformer['resblocks'])} blocks of the\ntower, two read\neach {size['tower']}",
        f"pooling attention\n4 patches a token\n{size['pooling']}",
        f"SwiGLU\nfeatures\n{size['projector']}",
    ]
    lower = [
        f"token ids\n1 x {len(row.ids)}",
        f"embedding table\n{size['table']}",
        f"add features at\nthe picture tokens\n{size['table']}",
        f"{len(decoder.blocks)} decoder blocks\n{size['blocks']}",
        f"final norm\nhidden states\n{size['blocks']}",
    ]
    figure, (axes,) = _axes(9.5, 2.9)
    axes.set(xlim=(0, 5), ylim=(0, 2.05))
    axes.axis("off")
    arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.2}
    for y, texts, shade in ((1.55, upper, "#fdf3e1"), (0.45, lower, "#e4edf7")):
        for i, text in enumerate(texts):
            axes.add_patch(Rectangle((i + 0.07, y - 0.34), 0.8, 0.68, facecolor=shade, edgecolor="black"))
            axes.text(i + 0.47, y, text, ha="center", va="center", fontsize=8.5)
            if i:
                axes.annotate("", (i + 0.07, y), (i - 0.13, y), arrowprops=arrow)
    axes.annotate("", (2.47, 0.79), (4.47, 1.21), arrowprops=arrow)
    return _picture(figure)


def rotary() -> Image.Image:
    """What distance does to the score of a query and an equal key, for the two networks here."""
    figure, (axes,) = _axes(6, 3.2)
    distance = torch.arange(0, 301)
    for theta, d, name, line in ((1e4, 32, "the tiny network", LINES[0]), (5e6, 128, "the 4B network", LINES[1])):
        x = torch.ones(1, 301, 1, d, dtype=torch.float64)
        here, there = (rotate(x, *rotary_angles(at[None], d, theta, x.dtype)) for at in (0 * distance, distance))
        score = (here * there).sum(-1)[0, :, 0] / d
        axes.plot(distance, score, label=f"theta = {theta:,.0f}, d = {d} ({name})", **line)
    axes.legend(frameon=False)
    _plot(axes, "distance in tokens", "score / d, query = key = (1, ..., 1)")
    return _picture(figure)


# ------------------------------------------------------------------------------------------------------ lesson 04


def mask_joint() -> Image.Image:
    return _mask("joint")


def mask_isolated() -> Image.Image:
    return _mask("isolated")


def _mask(mode: str) -> Image.Image:
    processor = Processor.from_folder(WEIGHTS / "tiny", max_tokens=4096)
    encoded = processor.encode("Describe the star.", ["a red star", "a star", "a small star"])
    labels = readable(map(processor.tokenizer.name, encoded.ids.tolist()))
    mask = collate([encoded], mode).mask
    return _remember(draw_mask(mask, labels=labels, cell=16), mask.dense.flatten().tolist(), labels)


def masks_with_a_picture() -> Image.Image:
    """Both modes side by side, for a prompt with a picture."""
    processor = Processor.from_folder(WEIGHTS / "tiny", max_tokens=4096)
    scene = world.make_scene(random.Random(0))
    encoded = processor.encode("Describe the star.", ["a red star", "a star", "a small star"], world.render(scene))
    masks = [collate([encoded], mode).mask for mode in MODES]
    halves = [draw_mask(mask, cell=7) for mask in masks]
    width, height = halves[0].size
    both = Image.new("RGB", (2 * width + 20, height + 30), "white")
    for i, (half, name) in enumerate(zip(halves, MODES, strict=True)):
        both.paste(half, (i * (width + 20), 30))
        ImageDraw.Draw(both).text((i * (width + 20) + width / 2, 8), name, "black", ImageFont.load_default(18), "ma")
    return _remember(both, [n for mask in masks for n in mask.dense.flatten().tolist()], MODES)


# ------------------------------------------------------------------------------------------------- lessons 06 and 09


def training() -> Image.Image:
    """The loss of the two shipped reward models while they were trained, each beside the loss of guessing."""
    figure, panels = _axes(8, 3, 2, sharey=True)
    guess = mean([math.log(n) for n in MIXED])
    for axes, (mode, name), line in zip(
        panels, (("joint", "tiny-rm"), ("isolated", "tiny-rm-isolated")), LINES, strict=False
    ):
        log = _read_lines(WEIGHTS / name / "metrics.jsonl")
        _curve(axes, log, "loss", 10, mode, line)
        axes.axhline(guess, color="black", linewidth=0.8, linestyle=":")
        axes.text(log[-1]["step"], guess * 1.1, "guessing", ha="right", fontsize=8)
        axes.set(yscale="log")
        axes.set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
        axes.minorticks_off()
        _plot(axes, "step (thick: mean of 21, thin: each)", "loss" if mode == "joint" else "", mode)
    return _picture(figure)


def saving() -> Image.Image:
    """N (P + R) / (P + N R), and where it tends."""
    figure, (axes,) = _axes(6, 3.4)
    numbers = range(1, 65)
    for (P, R), line in zip(((1000, 50), (1000, 100), (1000, 400), (40, 100)), LINES, strict=False):
        axes.plot(numbers, [n * (P + R) / (P + n * R) for n in numbers], label=f"P = {P}, R = {R}", **line)
    axes.legend(frameon=False)
    _plot(axes, "number of responses", "times fewer tokens")
    return _picture(figure)


WAYS = ["N separate passes", "one padded batch of N", "prompt once, batch of N after it"]
WAYS += ["one pass, isolated", "one pass, joint"]


def measured() -> Image.Image:
    """Seconds against the number of responses and against the prompt's length, as `bench score --json` wrote them."""
    figure, panels = _axes(9, 3.8, 2)
    files = (
        ("bench_n", "n", "number of responses N", "P = 1040, R = 100"),
        ("bench_p", "prompt_tokens", "tokens of prompt P", "N = 4, R = 100"),
    )
    for axes, (file, key, name, title) in zip(panels, files, strict=True):
        rows = json.loads((RUNS / f"{file}.json").read_text(encoding="utf-8"))
        for way, line in zip(WAYS, LINES, strict=True):
            mine = [row for row in rows if row["way"] == way]
            axes.plot([row[key] for row in mine], [row["seconds"] for row in mine], label=way, marker=".", **line)
        axes.set(xscale="log", yscale="log")
        axes.set_xticks([row[key] for row in mine], [str(row[key]) for row in mine])
        low, high = (round(math.log2(end(row["seconds"] for row in rows if row["way"] in WAYS))) for end in (min, max))
        ticks = [2.0**k for k in range(low, high + 1)]
        axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()
        _plot(axes, name, "seconds", title)
    panels[0].legend(frameon=False, fontsize=8)
    return _picture(figure)


# ------------------------------------------------------------------------------------------------- lessons 10 and 11


def rankings() -> Image.Image:
    """Simulated voters: how close three methods come to the truth, by votes a pair."""
    figure, panels = _axes(8, 3.2, 2, sharey=True)
    votes = (1, 3, 9, 31)
    for axes, answers in zip(panels, (8, 19), strict=True):
        for method, line in zip(("graph, denoised", "graph, raw", "Borda, raw"), LINES, strict=False):
            rng, found = np.random.default_rng(0), []
            for count in votes:
                studies = [simulate(answers, count, 0.3, rng) for _ in range(12)]
                found.append(mean([tau_b(METHODS[method](W).tolist(), truth) or 0.0 for W, truth in studies]))
            axes.plot(votes, found, label=method, marker=".", **line)
        axes.set(xscale="log")
        axes.set_xticks(votes, [str(v) for v in votes])
        axes.minorticks_off()
        _plot(
            axes,
            "votes a pair, 30% wrong",
            "Kendall's tau-b" if answers == 8 else "",
            f"{answers} answers, 12 simulated items a point",
        )
    panels[0].legend(frameon=False)
    return _picture(figure)


def clip_and_kl() -> Image.Image:
    """The clipped objective of one token by how much likelier it became, and the KL estimate by how far it went."""
    figure, (left, right) = _axes(8, 3, 2)
    q, clip = torch.linspace(0.4, 1.6, 121), GrpoConfig.clip
    for advantage, line in ((1.0, LINES[0]), (-1.0, LINES[1])):
        held = torch.minimum(q * advantage, q.clamp(1 - clip, 1 + clip) * advantage)
        left.plot(q, held, label=f"A = {advantage:+.0f}", **line)
    left.axvspan(1 - clip, 1 + clip, color="#eeeeee", zorder=0)
    left.legend(frameon=False)
    _plot(left, "q = p / p_old", "objective")
    g = torch.linspace(-2, 2, 121, dtype=torch.float64)
    right.plot(g, torch.expm1(g) - g, **LINES[0])
    _plot(right, "g = log(p_ref / p)", "KL estimate")
    return _picture(figure)


def grpo_runs() -> Image.Image:
    """Reward and true quality, step by step, with both rewards."""
    figure, (left, right) = _axes(8, 3, 2)
    for mode, line in (("joint", LINES[0]), ("isolated", LINES[1])):
        log = _read_lines(RUNS / "grpo" / f"{mode}-0.jsonl")
        for axes, key in ((left, "reward"), (right, "quality")):
            _curve(axes, log, key, 2, f"{mode} reward", line)
    left.legend(frameon=False)
    _plot(left, "step (thick: mean of 5, thin: each)", "reward, each judge's own scale")
    _plot(right, "step", "true quality of sampled answers")
    return _picture(figure)


def policies() -> Image.Image:
    """Held-out prompts while a policy learns from each reward: its mean reward, and the true quality. Thick: mean over
    seeds, thin: each seed."""
    runs = json.loads((RUNS / "claims_grpo.json").read_text(encoding="utf-8"))["runs"]
    figure, panels = _axes(12, 3.5, 4)
    shown = [(learned, key) for learned in ("all groups", "100 groups, 40% swapped") for key in ("reward", "quality")]
    for axes, (learned, key) in zip(panels, shown, strict=True):
        for kind in JUDGES:
            line = LINES[[*TITLES].index(kind)]  # as in `less_data`
            looks = [run["curve"] for run in runs if (run["learned"], run["kind"]) == (learned, kind)]
            steps = [at["step"] + 1 for at in looks[0]]
            values = np.array([[at[f"held_out_{key}"] for at in curve] for curve in looks])
            axes.plot(steps, values.mean(0), label=TITLES[kind], **line)
            axes.plot(steps, values.T, color=line["color"], alpha=0.4, linewidth=0.7)
        what = {"reward": "reward, each judge's own scale", "quality": "true quality"}[key]
        _plot(axes, "step", what, f"judge learned from\n{learned}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return _picture(figure)


# ------------------------------------------------------------------------------------------------------ lesson 08


def less_data() -> Image.Image:
    """Accuracy against the number of groups in training, where ranks are true and where they are noisy: means and
    intervals over seeds, which the frame cuts off, and each seed as a dot."""
    runs = json.loads((RUNS / "claims_data.json").read_text(encoding="utf-8"))["runs"]
    figure, panels = _axes(8.5, 3.4, 2, sharey=True)
    for axes, swapped in zip(panels, sorted({run["swapped"] for run in runs}), strict=True):
        for shift, (kind, label), line in zip((0.91, 0.97, 1.03, 1.09), TITLES.items(), LINES, strict=False):
            by_count: dict[int, list[float]] = {}
            for run in runs:
                if (run["swapped"], run["kind"]) == (swapped, kind):
                    by_count.setdefault(run["groups"], []).append(run["accuracy"])
            means = [mean(values) for values in by_count.values()]
            half = [interval_over_seeds(values)[1] - mean(values) for values in by_count.values()]
            places = [shift * n for n in by_count]
            axes.errorbar(places, means, half, label=label, elinewidth=0.7, capsize=3, **line)
            for place, values in zip(places, by_count.values(), strict=True):
                axes.plot([place] * len(values), values, linestyle="", marker=".", color=line["color"])
        axes.set(xscale="log", ylim=(0, 1.05))
        axes.set_xticks([*by_count], [f"{n:,}" for n in by_count])
        axes.minorticks_off()
        _plot(axes, "groups in training", "accuracy" if swapped == 0 else "", f"{swapped:.0%} of pairs swapped")
    panels[0].legend(frameon=False, loc="lower right", fontsize=8)
    return _picture(figure)


def masks_compared() -> Image.Image:
    """One set of weights under three masks, for a model trained in each mode."""
    rows = json.loads((RUNS / "masks.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row.get("noise") == world.NOISE]
    masks = [key for key in rows[0] if key.startswith(("joint", "isolated"))]
    figure, panels = _axes(8.5, 3.4, 2, sharey=True)
    for axes, task in zip(panels, ("absolute", "corroborated"), strict=True):
        mine = [row for row in rows if row["task"] == task]
        for i, (mask, line, hatch) in enumerate(zip(masks, LINES, ("", "//", ".."), strict=False)):
            places, style = [j + 0.27 * (i - 1) for j in range(len(mine))], {"color": line["color"], "hatch": hatch}
            bars = axes.bar(places, [row[mask] for row in mine], 0.24, label=mask, edgecolor="white", **style)
            axes.bar_label(bars, fmt="%.3f", fontsize=7.5)
        axes.set_xticks(range(len(mine)), [f"trained {row['trained']}" for row in mine])
        axes.set(ylim=(0, 1.4), yticks=[0, 0.25, 0.5, 0.75, 1])
        _plot(axes, "", "accuracy" if task == "absolute" else "", task)
    panels[0].legend(
        title="mask used for scoring", frameon=False, fontsize=8, title_fontsize=8, ncols=3, columnspacing=0.8
    )
    panels[1].axhline(world.CEILINGS["isolated"], color="black", linewidth=0.8, linestyle=":")
    panels[1].text(0.5, world.CEILINGS["isolated"] + 0.01, "1/3", ha="center", fontsize=8)
    return _picture(figure)


FIGURES: dict[str, Callable[[], Image.Image]] = {
    figure.__name__: figure
    for figure in (
        scene,
        tiling,
        windows,
        network,
        rotary,
        mask_joint,
        mask_isolated,
        masks_with_a_picture,
        training,
        saving,
        measured,
        rankings,
        clip_and_kl,
        grpo_runs,
        policies,
        masks_compared,
        less_data,
    )
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, figure in FIGURES.items():
        save(figure(), FOLDER / f"{name}.png")
        print(FOLDER / f"{name}.png")
