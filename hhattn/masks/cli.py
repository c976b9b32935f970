"""``hhattn masks``: the patterns there are, and what one of them looks like and costs on a grid."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hhattn import masks
from hhattn.layout import VideoLayout
from hhattn.masks import BlockMask

app = typer.Typer(help="Sparsity patterns: what there is, and what one costs.", no_args_is_help=True)

_COMMON = ("layout", "block_size", "order", "q_frames", "k_frames")


def patterns() -> dict[str, Callable[..., BlockMask]]:
    """Name and builder of every static pattern."""
    made = {name: getattr(masks, name) for name in masks.__all__}
    return {n: f for n, f in made.items() if inspect.isfunction(f) and "q_frames" in inspect.signature(f).parameters}


def own_options(build: Callable[..., BlockMask]) -> dict[str, inspect.Parameter]:
    """Arguments of a builder beyond those that all share."""
    return {n: p for n, p in inspect.signature(build).parameters.items() if n not in _COMMON}


@app.command("list")
def show_patterns() -> None:
    """Name every pattern, its options and what it is."""
    for name, build in patterns().items():
        options = ", ".join(str(p).split(":")[0] + _default(p) for p in own_options(build).values())
        module = inspect.getmodule(build)
        typer.echo(f"{name:14}{(module.__doc__ or '').splitlines()[0]:72}{options}")


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is inspect.Parameter.empty else f"={parameter.default}"


@app.command("show")
def show(
    pattern: Annotated[str, typer.Argument(help='A name of `hhattn masks list`, or several: "radial & sink | text".')],
    grid: Annotated[str, typer.Option(help="Frames, rows and columns of tokens.")] = "8x23x40",
    tile: Annotated[str, typer.Option(help="Tile of the grid.")] = "4x4x4",
    text: Annotated[int, typer.Option(help="Text tokens beside the video.")] = 0,
    text_first: Annotated[bool, typer.Option("--text-first", help="Text stands before the video.")] = False,
    order: Annotated[str, typer.Option(help="Order of the tokens: raster or tile.")] = "raster",
    block: Annotated[str, typer.Option(help="Tokens in a block, of queries and of keys.")] = "64x64",
    option: Annotated[
        list[str] | None,
        typer.Option(help="An option of the pattern: kernel_size=5,9,9; by head window=1,3,3;3,1,1; radial.decay=0.5."),
    ] = None,
    query: Annotated[
        str, typer.Option(help="Query whose keys are drawn, as frame,row,column; the middle by default.")
    ] = "",
    head: Annotated[int, typer.Option(help="Head that is drawn, where each has its own pattern.")] = 0,
    head_dim: Annotated[int, typer.Option(help="Head dim that FLOPs are counted for.")] = 128,
    heads: Annotated[int, typer.Option(help="Heads that FLOPs are counted for; the mask's own by default.")] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Picture to draw.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What PATTERN attends on a grid, how sparse it is, and what it costs."""
    try:
        frames, height, width = sizes("grid", grid, 3)
        layout = VideoLayout(frames, height, width, sizes("tile", tile, 3), text, text_first)
        common = {"block_size": sizes("block", block, 2), "order": order}
        start = time.perf_counter()
        mask = combine(layout, pattern, option or [], common)
        seconds = time.perf_counter() - start
        for name, value, least in (("head_dim", head_dim, 1), ("heads", heads, 0)):
            if value < least:
                raise ValueError(f"{name}={value}: accepted is {least} or more")
        at = _query(layout, query)
        if not 0 <= head < mask.kv_num_blocks.shape[1]:
            raise ValueError(f"head={head}: accepted are 0 ... {mask.kv_num_blocks.shape[1] - 1}")
        report = figures(mask, head_dim, heads, seconds)
        if output is not None:
            _draw(mask, at, head, " ".join([pattern, *(option or [])]) + f" on {grid}", output)
    except (ValueError, TypeError, ImportError) as error:
        typer.echo(f"hhattn masks show: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(json.dumps({"pattern": pattern, **report}, indent=2) if as_json else _table(mask, report))


def combine(layout: VideoLayout, expression: str, options: list[str], common: dict[str, Any]) -> BlockMask:
    """The mask of ``a & b | c``, ``&`` first, as in Python. An option goes to all the patterns that have it, at least
    one."""
    values = dict(_option(text) for text in options)
    used: set[str] = set()

    def build(name: str) -> BlockMask:
        known = patterns()
        if name not in known:
            raise ValueError(f"pattern={name!r}: accepted are {', '.join(known)}")
        own = own_options(known[name])
        mine = {key: key.rpartition(".")[2] for key in values if key.rpartition(".")[0] in ("", name)}
        mine = {key: argument for key, argument in mine.items() if argument in own}
        used.update(mine)
        missing = [n for n, p in own.items() if p.default is inspect.Parameter.empty and n not in mine.values()]
        if missing:
            raise ValueError(f"{name} needs --option {' and '.join(f'{n}=...' for n in missing)}")
        return known[name](layout, **{argument: values[key] for key, argument in mine.items()}, **common)

    union: BlockMask | None = None
    for term in expression.split("|"):
        part: BlockMask | None = None
        for name in term.split("&"):
            mask = build(name.strip())
            part = mask if part is None else part & mask
        union = part if union is None else union | part  # type: ignore[operator]
    if set(values) - used:
        raise ValueError(f"option={', '.join(sorted(set(values) - used))}: {expression} has no such option")
    assert union is not None
    return union


def figures(mask: BlockMask, head_dim: int, heads: int, seconds: float) -> dict[str, Any]:
    """What a mask costs. The predicted speed-up is FLOPs of dense attention over FLOPs executed under the mask, every
    pair of every touched block: what a kernel as fast on a block as dense attention would gain, and no measurement."""
    batch, own_heads = mask.kv_num_blocks.shape[:2]
    heads = heads or own_heads
    executed = mask.flops(head_dim, batch=batch, heads=heads, executed=True)
    dense = 4 * head_dim * mask.q_len * mask.k_len * batch * heads
    return {
        "tokens": [mask.q_len, mask.k_len],
        "blocks": list(mask.num_blocks),
        "block_size": list(mask.block_size),
        "order": mask.order,
        "batch": batch,
        "heads": own_heads,
        "density": mask.density,
        "block_density": mask.block_density,
        "partial_blocks": int(mask.kv_num_blocks.sum()),
        "full_blocks": int(mask.full_kv_num_blocks.sum()),
        "bit_tiles": len(mask.tiles),
        "flops": mask.flops(head_dim, batch=batch, heads=heads),
        "flops_executed": executed,
        "flops_dense": dense,
        "flops_head_dim": head_dim,
        "flops_heads": heads,
        "predicted_speedup": dense / executed if executed else None,
        "bytes": mask.nbytes,
        "build_seconds": seconds,
    }


def _table(mask: BlockMask, r: dict[str, Any]) -> str:
    """``figures`` for people."""
    nq, nk = r["blocks"]
    per = f"forward, {r['batch']} x {r['flops_heads']} heads of {r['flops_head_dim']}"
    gain = f"{r['predicted_speedup']:.2f}x over dense" if r["predicted_speedup"] else "nothing to compute"
    rows = {
        "tokens": f"{mask.q_len} x {mask.k_len} in {nq} x {nk} blocks of {mask.block_size}, {mask.order} order",
        "density": f"{r['density']:.3%} of the pairs are attended",
        "block density": f"{r['block_density']:.3%} of the blocks are touched: {r['full_blocks']} full, "
        f"{r['partial_blocks']} partial, of {r['bit_tiles']} kinds",
        "FLOPs": f"{r['flops']:.3e} attended, {r['flops_executed']:.3e} executed, {r['flops_dense']:.3e} dense ({per})",
        "predicted": f"{gain}, by FLOPs executed; not measured",
        "memory": f"{r['bytes'] / 2**20:.1f} MiB",
        "built in": f"{r['build_seconds']:.3f} s",
    }
    return "\n".join(f"{name:14}{value}" for name, value in rows.items())


def _draw(mask: BlockMask, query: tuple[int, int, int], head: int, title: str, output: Path) -> None:
    from hhattn.masks import _draw as draw

    fig = draw.figure(mask, query, title, head=head)
    fig.savefig(output, dpi=100)


def sizes(name: str, text: str, count: int) -> tuple[Any, ...]:
    """``8x23x40`` or ``8,23,40``."""
    parts = text.lower().replace("x", ",").split(",")
    if len(parts) != count or not all(p.strip().isdigit() for p in parts):
        raise ValueError(
            f"{name}={text}: accepted are {count} whole numbers, as in {'x'.join(['4', '6', '8'][:count])}"
        )
    return tuple(int(p) for p in parts)


def _query(layout: VideoLayout, text: str) -> tuple[int, int, int]:
    at = sizes("query", text, 3) if text else tuple(n // 2 for n in layout.grid)
    if not all(x < n for x, n in zip(at, layout.grid, strict=True)):
        raise ValueError(f"query={text}: accepted are tokens of the grid {layout.grid}")
    return at[0], at[1], at[2]


def _option(text: str) -> tuple[str, Any]:
    """``name=value``: a number, true or false, numbers with commas between or behind, several such with semicolons."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"option={text}: accepted is name=value")
    lists = [tuple(_value(name, v) for v in part.removesuffix(",").split(",")) for part in value.split(";")]
    if len(lists) > 1:
        return name, lists
    return name, lists[0] if "," in value else lists[0][0]


def _value(name: str, text: str) -> Any:
    words = {"true": True, "false": False}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise ValueError(f"option={name}={text}: accepted are numbers, true and false, with commas or semicolons between")
