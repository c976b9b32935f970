"""docs/recall.md and its picture: what each pattern keeps at a density, and where dense is faster.

On queries and keys of the bundled model as it generates, and on synthetic ones like a video's: see :func:`video_like`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hhattn
from hhattn import masks
from hhattn._memory import keep_freed_memory
from hhattn.masks.calibrate import Row, calibrate
from hhattn.nn import block_sparse_attention as layer_module

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- recall: written by benchmarks/recall.py -->", "<!-- end of recall -->"


class Sample(NamedTuple):
    """q, k, v [1, S, H, D] in raster order, and the layout of the keys."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    layout: hhattn.VideoLayout


def video_like(layout: hhattn.VideoLayout, heads: int, dim: int, seed: int = 0) -> Sample:
    """Smooth random fields that move, then rotary embedding.

    Content is 16 random fields over (frame, row, column), each the sum of 12 plane waves: wave vectors are normal with
    a standard deviation of 2 periods a picture, and their frequency in time is what a drift of 1/40 of the picture a
    frame makes of them, plus a little change of their own. A head's keys are a random projection of the content, its
    queries the same projection to four fifths; both get a fifth of noise, are normed (RMS 1) and rotated by
    :func:`hhattn.rope_3d`; queries are then doubled, for attention as sharp as that of a trained model.
    """
    g = torch.Generator().manual_seed(seed)
    t, y, x = (torch.arange(n) / m for n, m in zip(layout.grid, (1, layout.height, layout.width), strict=True))
    waves, phase = 2 * torch.randn(16, 12, 2, generator=g), 2 * torch.pi * torch.rand(16, 12, generator=g)
    drift = torch.randn(2, generator=g) / 40
    beat = waves @ drift + 0.01 * torch.randn(16, 12, generator=g)
    content = torch.zeros(*layout.grid, 16)
    for m in range(12):
        angle = (
            2
            * torch.pi
            * (
                y[None, :, None, None] * waves[:, m, 0]
                + x[None, None, :, None] * waves[:, m, 1]
                + t[:, None, None, None] * beat[:, m]
            )
        )
        content += (angle + phase[:, m]).cos()
    content = content.reshape(-1, 16) / 6**0.5
    k_map = torch.randn(16, heads * dim, generator=g) / 4
    q_map = 0.8 * k_map + 0.6 * torch.randn(16, heads * dim, generator=g) / 4
    shape = (1, layout.seq_len, heads, dim)
    q, k = ((content @ a + 0.2 * torch.randn(layout.seq_len, heads * dim, generator=g)) for a in (q_map, k_map))
    v = (content @ torch.randn(16, heads * dim, generator=g) / 4).view(shape)
    q, k = hhattn.qk_norm_rope(q.view(shape), k.view(shape), *hhattn.rope_3d(layout.grid, dim), norm="rms")
    name = f"synthetic, {layout.frames}x{layout.height}x{layout.width}, {heads} heads of {dim}"
    return Sample(name, 2 * q, k, v, layout)


def of_the_model(chunks: int) -> list[Sample]:
    """What the sparse layers of the bundled model attend in the last of ``chunks`` chunks of a clip. The keys are those
    of the sink and of the last frames, then the chunk's."""
    from hhattn.video.generate import Pipeline, Request

    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    attend = layer_module.block_sparse_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any) -> Any:
        seen.append((q, k, v))
        return attend(q, k, v, mask, **more)

    layer_module.block_sparse_attention = watch  # type: ignore[assignment]
    try:
        for _ in Pipeline().stream(Request(seconds=float(chunks)), wanted=lambda index: False):
            pass
    finally:
        layer_module.block_sparse_attention = attend
    layers, found = 2, []
    calls = seen[-2 * layers : -layers]  # the last chunk's last denoising; the pass that commits it follows
    for number, (q, k, v) in enumerate(calls):
        layout = hhattn.VideoLayout(k.shape[1] // 920, 23, 40, tile=(1, 4, 8))
        mine = hhattn.VideoLayout(q.shape[1] // 920, 23, 40, tile=(1, 4, 8))
        raster = mine.from_tiles(q), layout.from_tiles(k), layout.from_tiles(v)
        found.append(Sample(f"bundled model, sparse layer {number + 1}", *raster, layout))
    return found


def crossover(sample: Sample, rounds: int) -> tuple[float, float]:
    """The density at which choosing blocks (mean_pool) and attending them takes as long as attending all of them, by
    block_sparse_attention and by PyTorch's SDPA. The time of sparse attention is a line through those at an eighth and
    at a half; the shortest of interleaved rounds."""
    q, k, v = sample.q, sample.k, sample.v
    heads = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    everything = masks.select(q, k, masks.mean_pool(), masks.top_p(1.0))

    def sparse(density: float) -> Callable[[], object]:
        policy = masks.top_k(ratio=density)
        return lambda: hhattn.block_sparse_attention(q, k, v, masks.select(q, k, masks.mean_pool(), policy))

    runs = [
        sparse(1 / 8),
        sparse(1 / 2),
        lambda: hhattn.block_sparse_attention(q, k, v, everything),
        lambda: torch.nn.functional.scaled_dot_product_attention(*heads),
    ]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, into in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            into.append(time.perf_counter() - start)
    low, high, ours, sdpa = (min(t[1:]) for t in times)
    slope = (high - low) / (1 / 2 - 1 / 8)
    return 1 / 8 + (ours - low) / slope, 1 / 8 + (sdpa - low) / slope


def table(sample: Sample, rows: list[Row], cross: tuple[float, float]) -> str:
    densities = sorted({row.target for row in rows})
    lines = [
        f"**{sample.name}**: {sample.q.shape[1]:,} queries, {sample.k.shape[1]:,} keys. Attending all blocks is faster "
        f"above a density of {cross[0]:.2f}, PyTorch's dense attention above {cross[1]:.2f}.",
        "",
        "| pattern | " + " | ".join(f"at {d:g}" for d in densities) + " |",
        "|---|" + "---|" * len(densities),
    ]
    for name in dict.fromkeys(row.pattern for row in rows):
        cells = []
        for d in densities:
            row = next(r for r in rows if r.pattern == name and r.target == d)
            note = "" if abs(row.executed - d) < 0.1 * d else f" ({row.executed:.2f})"
            cells.append(f"{row.recall:.1%}, {row.error:.1%}{note}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# a colour for each pattern, a stroke for each kind of it
COLOURS = {"mean_pool": "C0", "antidiagonal": "C1", "centroid": "C2", "best blocks": "black", "frame_window": "C3"}
COLOURS |= {"sliding_tile": "C4", "neighborhood": "C5", "radial": "C6"}
STROKES = {"top-k": "-", "top-p": ":"}


def draw(results: list[tuple[Sample, list[Row], tuple[float, float]]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(results), figsize=(4.6 * len(results), 7.4), squeeze=False, sharex=True)
    for column, (sample, rows, cross) in enumerate(results):
        top, bottom = axes[0][column], axes[1][column]
        for name in dict.fromkeys(row.pattern for row in rows):
            mine = sorted((r for r in rows if r.pattern == name), key=lambda r: r.executed)
            pattern, _, policy = name.partition(", ")
            style = {"marker": "o", "ms": 3, "color": COLOURS[pattern], "ls": STROKES.get(policy, "--"), "label": name}
            top.plot([r.executed for r in mine], [r.recall for r in mine], **style)
            bottom.plot([r.executed for r in mine], [r.error for r in mine], **style)
        for ax in (top, bottom):
            ax.axvline(min(cross), color="grey", lw=5, alpha=0.3)
            ax.set_xscale("log")
            ax.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
            ax.set_ylim(bottom=0)
        top.set_title(sample.name, fontsize=9)
        bottom.set_xlabel("density (share of blocks executed)")
    axes[0][0].set_ylabel("attention mass kept")
    axes[1][0].set_ylabel("relative error of the output")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=6, fontsize=8)
    figure.suptitle("Attention mass kept and error of the output; right of the grey bar dense attention is faster")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes and no files: shows that it runs")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    grid = (3, 8, 16) if args.quick else (16, 16, 24)
    samples = [video_like(hhattn.VideoLayout(*grid, tile=(4, 4, 4)), 1 if args.quick else 2, 64)]
    samples += [] if args.quick else of_the_model(3)
    densities = (0.25,) if args.quick else (0.05, 0.1, 0.2, 0.4)
    results = []
    for sample in samples:
        rows = list(calibrate(sample.q, sample.k, sample.v, densities, layout=sample.layout))
        results.append((sample, rows, crossover(sample, 1 if args.quick else args.rounds)))
        print(table(*results[-1]), end="\n\n", flush=True)
    if args.quick:
        return
    draw(results, DOCS / "recall.png")
    page = DOCS / "recall.md"
    head, rest = page.read_text().split(BEGIN)
    body = "\n\n".join(table(*result) for result in results)
    page.write_text(f"{head}{BEGIN}\n\n{body}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
