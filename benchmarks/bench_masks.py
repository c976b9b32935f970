"""Building the static masks of a minute at 720p: time, and memory on the way beside the mask's own."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hhattn import BlockMask, VideoLayout, masks

PATTERNS: dict[str, Callable[..., BlockMask]] = {
    "sliding_tile (3, 3, 3)": lambda layout, **common: masks.sliding_tile(layout, (3, 3, 3), **common),
    "neighborhood (5, 9, 9)": lambda layout, **common: masks.neighborhood(layout, (5, 9, 9), **common),
    "radial": masks.radial,
    "block_causal 4": lambda layout, **common: masks.block_causal(layout, 4, **common),
    "frame_window 4": lambda layout, **common: masks.frame_window(layout, 4, **common),
    "sink 1": masks.sink,
    "spatial": masks.spatial,
    "temporal": masks.temporal,
    "text": masks.text,
    "dense": masks.dense,
}


def peak_since(reset: bool) -> int:
    """Bytes resident at most since the last reset; Linux only."""
    if reset:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    field = "VmRSS" if reset else "VmHWM"
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def measure(name: str, order: str, block_size: tuple[int, int], rounds: int, layout: VideoLayout) -> dict[str, Any]:
    """Median elapsed and least processor time of ``rounds``, and the first round's peak."""
    build = PATTERNS[name]
    elapsed, processor, beside = [], [], 0
    for i in range(rounds):
        before = peak_since(reset=True)
        start = time.perf_counter(), time.process_time()
        mask = build(layout, block_size=block_size, order=order)
        elapsed.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
        beside = beside if i else peak_since(reset=False) - before - mask.nbytes
    return {
        "pattern": name,
        "order": order,
        "block_size": list(block_size),
        "ms": 1e3 * statistics.median(elapsed),
        "processor_ms": 1e3 * min(processor),
        "mask_mb": mask.nbytes / 1e6,
        "peak_beside_mb": max(0, beside) / 1e6,
        "density": mask.density,
        "block_density": mask.block_density,
    }


def options() -> argparse.Namespace:
    """Those of the other benchmarks as far as they mean anything here; freed memory is given back, as usual."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of blocks of 64x64")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the figures to this file, one object a line")
    return parser.parse_known_args()[0]


def main() -> int:
    args = options()
    if args.device != "cpu":
        print("masks are built on the CPU")
        return 0
    torch.set_num_threads(args.threads)
    masks.sink(VideoLayout(2, 2, 2))  # what is loaded at the first use is no part of it
    layout = VideoLayout(240, 23, 40, text_len=0)
    print(f"{layout.seq_len} tokens; ms of processor time, {args.threads} threads; MB of the mask; peak beside it\n")
    print("| pattern | order | blocks | ms | mask, MB | peak, MB | density | blocks touched |\n" + "|---" * 8 + "|")
    for name in PATTERNS:
        joint = VideoLayout(240, 23, 40, text_len=512) if name == "text" else layout
        for order in ("raster", "tile"):
            for block_size in ((64, 64),) if args.quick else ((64, 64), (64, 128)):
                joint.tile_index(), joint.raster_index()
                r = measure(name, order, block_size, 1 if args.quick else args.rounds, joint)
                print(_row(r), flush=True)
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps(r) + "\n")
    return 0


def _row(r: dict[str, Any]) -> str:
    blocks = "x".join(map(str, r["block_size"]))
    sizes = f"{r['processor_ms']:.0f} | {r['mask_mb']:.1f} | {r['peak_beside_mb']:.0f}"
    return f"| {r['pattern']} | {r['order']} | {blocks} | {sizes} | {r['density']:.2%} | {r['block_density']:.1%} |"


if __name__ == "__main__":
    sys.exit(main())
