"""Selectors against the attention that they save: choosing a quarter of the blocks, and attending them."""

from __future__ import annotations

import argparse
import json
import statistics

import torch
from harness import name_of, options, seconds
from rich.console import Console
from rich.table import Table
from torch import Tensor

import hhattn
from hhattn import masks

DENSITY = 0.25
GOAL = 0.10  # of the time that attention saves at that density


def smooth(tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """[1, tokens, heads, dim] that varies slowly along the tokens, as video does."""
    g = torch.Generator().manual_seed(seed)
    knots = torch.randn(heads * dim, max(2, tokens // 64), generator=g)
    field = torch.nn.functional.interpolate(knots[None], size=tokens, mode="linear")
    noise = 0.3 * torch.randn(tokens, heads * dim, generator=g)
    return (field[0].T + noise).view(1, tokens, heads, dim).to(device=device, dtype=dtype).contiguous()


def shapes(quick: bool) -> list[tuple[int, int, int]]:
    """(tokens, heads, head dim)."""
    return [(1024, 2, 64)] if quick else [(8192, 4, 64), (8192, 4, 128), (16384, 2, 64), (32768, 1, 64)]


def measure(tokens: int, heads: int, dim: int, dtype: torch.dtype, args: argparse.Namespace) -> list[dict[str, object]]:
    """A row a selector: its time over (dense attention's time less that of the attention it leaves), round by round."""
    q, k, v = (smooth(tokens, heads, dim, dtype, args.device, seed) for seed in range(3))
    policy = masks.top_k(ratio=DENSITY)
    everything = masks.select(q, k, masks.mean_pool(), masks.top_p(1.0))
    quarter = masks.select(q, k, masks.mean_pool(), policy)
    assert abs(quarter.density - DENSITY) < 0.02
    carried = masks.centroid().cluster(q, k)
    sorted_qkv = carried.queries(q), carried.keys(k), carried.keys(v)

    def centroid() -> object:  # sorting and restoring are part of the cost
        clusters = masks.centroid().cluster(q, k, carried)
        mask = clusters.select(policy)
        clusters.queries(q), clusters.keys(k), clusters.keys(v), clusters.restore(sorted_qkv[0])
        return mask

    selectors = {
        "mean_pool": lambda: masks.select(q, k, masks.mean_pool(), policy),
        "self_similarity": lambda: masks.select(q, k, masks.self_similarity(), policy),
        "antidiagonal(16)": lambda: masks.select(q, k, masks.antidiagonal(16), policy),
        "centroid, carried over": centroid,
    }
    contenders = {
        "dense": lambda: hhattn.block_sparse_attention(q, k, v, everything),
        "quarter": lambda: hhattn.block_sparse_attention(q, k, v, quarter),
        **selectors,
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for function in contenders.values():
        function()
    for _ in range(args.rounds):
        for name, function in contenders.items():
            times[name].append(seconds(function, args.device))
    saved = [dense - sparse for dense, sparse in zip(times["dense"], times["quarter"], strict=True)]
    rows: list[dict[str, object]] = []
    for name in selectors:
        shares = [t / s for t, s in zip(times[name], saved, strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4, method="inclusive")
        row: dict[str, object] = {"case": f"{tokens} tokens, {heads} heads of {dim}, {name_of(dtype)}", "name": name}
        row |= {"ms": statistics.median(times[name]) * 1e3, "saved_ms": statistics.median(saved) * 1e3}
        rows.append(row | {"share": middle, "low": low, "high": high, "goal": GOAL})
    return rows


def main() -> None:
    args = options(__doc__ or "", ("float32",))
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"select, density {DENSITY}: {where}, {args.rounds} interleaved rounds")
    for column in ("shape", "selector", "ms", "saves, ms", "share of what it saves", "quartiles", "goal"):
        table.add_column(column, justify="left" if column in ("shape", "selector") else "right")
    with torch.no_grad():
        for dtype in args.dtypes:
            for shape in shapes(args.quick):
                for i, row in enumerate(measure(*shape, dtype, args)):
                    verdict = f"{GOAL:.0%} {'✓' if row['share'] <= GOAL else '✗'}"
                    table.add_row(
                        "" if i else str(row["case"]),
                        str(row["name"]),
                        f"{row['ms']:.1f}",
                        f"{row['saved_ms']:.0f}",
                        f"{row['share']:.1%}",
                        f"{row['low']:.1%} to {row['high']:.1%}",
                        verdict,
                    )
                    if args.json:
                        with args.json.open("a") as file:
                            file.write(json.dumps({"benchmark": "select", "where": where} | row) + "\n")
                table.add_section()
    Console(width=max(Console().width, 120)).print(table)


if __name__ == "__main__":
    main()
