"""``hhattn generate``: words in, an MP4 out; ``hhattn evaluate``: figures of what comes out; ``hhattn words``."""

from __future__ import annotations

import importlib.util
import json
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track

from hhattn._memory import keep_freed_memory

from .evaluate import MARKS, measure, plot, prompts
from .generate import DEMO_PROMPT, Pipeline, Request
from .io import VideoWriter, check_encoder, check_writable, read_picture
from .presets import SIZES
from .prior import Sampling
from .text import SLOTS, parse, synonyms
from .world import RADIUS

console = Console(stderr=True)
QUIET = 10.0  # seconds without a word where there is no terminal to draw a bar on


def fail(message: object) -> typer.Exit:
    """One clear line on stderr, exit code 2."""
    print(f"hhattn: {message}", file=sys.stderr)
    return typer.Exit(2)


@contextmanager
def unwinding() -> Iterator[None]:
    """SIGTERM ends the process as an exception does, so that an unfinished file is removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="What to show (`hhattn words`); default: the demo's, or what --image shows.", show_default=False
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Length of the clip.")] = 60.0,
    size: Annotated[str, typer.Option(help=f"Height x width: {', '.join(SIZES)}.")] = "720x1280",
    fps: Annotated[float, typer.Option(help="Frames a second, 8 to 32.")] = 16.0,
    seed: Annotated[int, typer.Option(help="Chooses the path, the noise and every word the prompt leaves open.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps a chunk; default 1, with --model its distilled four.")
    ] = None,
    guidance: Annotated[
        float, typer.Option(help="Classifier-free guidance; 1 is off, above 1 doubles the cost.")
    ] = 1.0,
    noise: Annotated[
        float | None, typer.Option(help="Scale of the starting noise: 0 the mean picture, 1 all of it; default 0.3.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the motion prior; 0 takes the likeliest path; default 0.6.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Of the motion prior; 0 is off, as by default.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of the motion prior; 1 is off; default 0.9.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture that becomes the first frame.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The MP4 to write.")] = Path("out.mp4"),
    model: Annotated[
        Path | None, typer.Option(help="Folder of a SANA-Video pipeline (diffusers'), instead of the bundled model.")
    ] = None,
    then: Annotated[
        list[str] | None, typer.Option(help="With --model: CHUNK:PROMPT, another prompt from that chunk on.")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="With --model: latent frames a chunk; default 10.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of stdout.")] = False,
) -> None:
    """Generate a clip with the bundled model: text-to-video, or image-to-video with --image.

    With --model, by a SANA-Video pipeline's weights; a stopped run goes on when the same is asked for again.
    """
    if model is None and (then or chunk is not None):
        raise fail("--then and --chunk need --model")
    if model is not None:
        unused = {"noise": noise, "temperature": temperature, "top-k": top_k, "top-p": top_p}
        if given := [f"--{name}" for name, value in unused.items() if value is not None]:
            raise fail(f"{', '.join(given)}: of the bundled model, not accepted with --model")
        levels = None if steps is None else int(steps)
        long_clip(
            model, prompt, then or [], seconds, size, fps, seed, levels, guidance, chunk or 10, image, output, as_json
        )
        return
    steps = 1 if steps is None else steps
    noise, top_k = 0.3 if noise is None else noise, top_k or 0
    temperature, top_p = 0.6 if temperature is None else temperature, 0.9 if top_p is None else top_p
    try:
        if prompt is None:
            prompt = DEMO_PROMPT if image is None else ""
        request = Request(prompt, seconds, size, fps, seed, steps, guidance, noise, Sampling(temperature, top_k, top_p))
        picture = None if image is None else read_picture(image, *SIZES[size].native)
        if prompt or picture is None:
            parse(prompt, seed)
        check_encoder()
        check_writable(output)
        keep_freed_memory()
        pipeline = Pipeline()
        words = pipeline.understand(request, picture)
    except (ValueError, FileNotFoundError) as e:
        raise fail(e) from None
    note = f" (left open, chosen by the seed: {', '.join(words.chosen)})" if words.chosen else ""
    if words.unused:
        console.print(f"no effect on this model: {', '.join(words.unused)}", highlight=False)
    console.print(f"[bold]{words}[/]{note}, {request.frames} frames of {size} at {fps:g} a second", highlight=False)
    start, stages = time.perf_counter(), {"encode": 0.0}
    height, width = SIZES[size].output
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} frames"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    said = start
    try:
        with (
            unwinding(),
            VideoWriter(output, height, width, fps) as writer,
            Progress(*columns, console=console) as progress,
        ):
            task = progress.add_task("generating", total=request.frames)
            for part in pipeline.stream(request, picture):
                before = time.perf_counter()
                writer.write(part.frames)
                stages["encode"] += time.perf_counter() - before
                for name, spent in part.seconds.items():
                    stages[name] = stages.get(name, 0.0) + spent
                progress.update(task, advance=len(part.frames))
                if not console.is_terminal and (now := time.perf_counter()) - said > QUIET:
                    done, said = writer.frames, now
                    left = (now - start) * (request.frames - done) / done
                    console.print(f"{done}/{request.frames} frames in {now - start:.0f} s, {left:.0f} s to go")
    except OSError as e:
        print(f"hhattn: {output}: {e}", file=sys.stderr)
        raise typer.Exit(1) from None
    report = {
        "output": str(output),
        "frames": request.frames,
        "fps": fps,
        "width": width,
        "height": height,
        "seconds_wall": round(time.perf_counter() - start, 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "stages": {k: round(v, 2) for k, v in stages.items()},
        "model": "hhattn-dit-3m",
        "prompt": words.words,
        "chosen_by_seed": list(words.chosen),
        "unused_words": list(words.unused),
        "seed": seed,
    }
    console.print(
        f"wrote {output} in {report['seconds_wall']:.0f} s, peak memory {report['peak_rss_mb']:.0f} MB", highlight=False
    )
    if as_json:
        print(json.dumps(report))


def long_clip(
    model: Path,
    prompt: str | None,
    then: list[str],
    seconds: float,
    size: str,
    fps: float,
    seed: int,
    steps: int | None,
    guidance: float,
    chunk: int,
    image: Path | None,
    output: Path,
    as_json: bool,
) -> None:
    """``hhattn generate --model``."""
    from .long_clip import Clip, Job, parse_size, parse_switches

    try:
        if not prompt:
            raise ValueError("prompt is empty; accepted with --model: what to show")
        if importlib.util.find_spec("diffusers") is None:
            raise ValueError("--model needs diffusers, which is not installed: pip install 'hhattn[diffusers]'")
        prompts = parse_switches(prompt, then)
        clip = Clip(model, prompts, seconds, parse_size(size), fps, seed, steps, guidance, chunk, image)
        check_encoder()
        check_writable(output)
        keep_freed_memory()
        job = Job(clip, output)
    except (ValueError, FileNotFoundError) as e:
        raise fail(e) from None
    if job.done:
        console.print(f"going on at frame {job.done} of {job.request.frames}", highlight=False)
    try:
        report = {"output": str(output), **job.run(console)}
    except OSError as e:
        print(f"hhattn: {output}: {e}", file=sys.stderr)
        raise typer.Exit(1) from None
    report["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    console.print(f"wrote {output} in {report['seconds_wall']:.0f} s", highlight=False)
    if as_json:
        print(json.dumps(report))


def evaluate(
    count: Annotated[int, typer.Option("--prompts", help="How many prompts.")] = 8,
    seconds: Annotated[float, typer.Option(help=f"Length of each clip, {MARKS[0]:g} or more.")] = 60.0,
    steps: Annotated[int, typer.Option(help="Denoising steps a chunk.")] = 1,
    weights: Annotated[Path | None, typer.Option(help="Folder of weights; default: the package's.")] = None,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("out/evaluation.json"),
    picture: Annotated[Path | None, typer.Option("--plot", help="PNG to draw; needs matplotlib.")] = None,
) -> None:
    """Figures at 1, 5, 15, 30 and 60 s for several prompts, as JSON and as a plot."""
    try:
        if count < 1:
            raise ValueError(f"prompts={count}; accepted: 1 or more")
        if not seconds >= MARKS[0]:
            raise ValueError(f"seconds={seconds}; accepted: {MARKS[0]:g} or more, the first moment that is judged")
        requests = [Request(p, seconds=seconds, steps=steps, seed=i) for i, p in enumerate(prompts(count))]
        if picture is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib, which is not installed: pip install matplotlib")
        for path in (out, picture):
            if path is not None:
                check_writable(path)
        keep_freed_memory()
        pipeline = Pipeline(weights)
    except (ValueError, FileNotFoundError) as e:
        raise fail(e) from None
    rows: list[dict[str, Any]] = []
    for request in track(requests, description="clips", console=console):
        figures, steady = measure(pipeline, request)
        rows.append({"prompt": str(parse(request.prompt)), **asdict(steady), "at": [asdict(f) for f in figures]})
        last = rows[-1]["at"][-1]
        print(
            f"{request.prompt:40} box {last['box']:.1f} dB; no subject {last['box_no_subject']:.1f}, "
            f"wrong colour {last['box_wrong_color']:.1f}"
        )
        out.write_text(json.dumps({"radius": RADIUS, "steps": steps, "clips": rows}, indent=1))  # what is done is kept
    if picture is not None:
        plot(rows, picture)


def words() -> None:
    """List the words a prompt may use, with others for the same in brackets."""
    for slot, options in SLOTS.items():
        said = (f"{word} ({', '.join(also)})" if (also := synonyms(word)) else word for word in options)
        print(f"{slot:8} {', '.join(said)}")


__all__ = ["evaluate", "generate", "words"]
