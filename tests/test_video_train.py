"""Training: every loss falls, a killed run resumes, a pause stands still, a save is whole or not at all."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner
from video_models import TINY

from hhattn.video.codec import Codec
from hhattn.video.generate import Pipeline, Request
from hhattn.video.model import VideoDiT
from hhattn.video.presets import SIZES
from hhattn.video.prior import MotionPrior, tokenize
from hhattn.video.text import SLOTS
from hhattn.video.train import codec as codec_stage
from hhattn.video.train import data, dit, loop, reader
from hhattn.video.train import prior as prior_stage
from hhattn.video.train.__main__ import app as stages_app
from hhattn.video.train.muon import Muon, orthogonalize
from hhattn.video.train.prior import draw as draw_paths
from hhattn.video.weights import FOLDER, store
from hhattn.video.world import Clip, render


def run(out: Path, minutes: float, steps: list[int], start_from: Path | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_of(m: nn.Module, g: torch.Generator) -> Tensor:
        steps.append(1)
        x = torch.randn(16, 3, generator=g)
        return (m(x) - x.sum(1, keepdim=True)).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    return loop.run(
        "toy", out, model, [optimizer], loss_of, lambda m: {}, minutes=minutes, every=1.0, start_from=start_from
    )


def test_a_run_resumes_where_it_was(tmp_path: Path) -> None:
    first: list[int] = []
    run(tmp_path, 0.003, first)
    state = torch.load(tmp_path / "toy.pt")
    assert state["step"] == len(first) > 0
    more: list[int] = []
    run(tmp_path, 0.006, more)
    assert torch.load(tmp_path / "toy.pt")["step"] == len(first) + len(more)
    nothing: list[int] = []
    run(tmp_path, 0.006, nothing)
    assert not nothing


def test_a_run_starts_from_shipped_weights(tmp_path: Path) -> None:
    exact = nn.Linear(3, 1)
    nn.init.ones_(exact.weight)
    nn.init.zeros_(exact.bias)
    path = store(exact, "toy", tmp_path)
    made = run(tmp_path / "runs", 0.001, [], path)
    torch.testing.assert_close(made.weight, exact.weight, rtol=0, atol=1e-5)


def test_a_pause_file_makes_it_stand_still(tmp_path: Path) -> None:
    pause, steps = tmp_path / "pause", []
    pause.touch()
    thread = threading.Thread(target=run, args=(tmp_path, 0.002, steps))
    thread.start()
    time.sleep(0.5)
    assert not steps
    pause.unlink()
    thread.join(20)
    assert steps


def test_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    loop.save(path, {"a": 1})
    with pytest.raises(Exception, match="pickle"):
        loop.save(path, {"a": lambda: None})
    assert torch.load(path) == {"a": 1}


def test_muon_steps_are_orthogonal_and_lower_a_loss() -> None:
    g = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalize(g))
    assert ((singular > 0.6) & (singular < 1.3)).all()
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 24, bias=False), torch.randn(64, 8)
    target = x @ torch.randn(8, 24)
    optimizer, losses = Muon(layer.parameters(), 0.05), []
    for _ in range(150):  # a step moves every weight by about lr/5
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny training set: the encoder fitted on few clips, one shard."""
    out = tmp_path_factory.mktemp("train")
    codec = data.fit_codec(random.Random(0), clips=6)
    loop.save(out / "encoder.pt", data.encoder_of(codec.state_dict()))
    codec = data.load_codec(out)
    data.held_out(out, codec, count=2)
    loop.save(out / "clips-0-000.pt", data.make_clips(codec, random.Random(1), 2, 8))
    return out


def test_kept_latents_are_the_worlds(folder: Path) -> None:
    shard = torch.load(folder / "clips-0-000.pt")
    assert shard["z"].shape == (2, 8, 64, 23, 40)
    assert shard["poses"].shape == (2, 8, 4, 4)
    codec: Codec = data.load_codec(folder)
    assert codec.decode_linear(shard["z"][:1, :1].float()).clamp(0, 1).std() > 0.05
    begins = torch.cat([data.make_clips(codec, random.Random(i), 1, 2)["times"][:, 0] for i in range(12)]).std(1) == 0
    assert 1 <= begins.sum() <= 6, "about one clip in four begins with the picture that begins a video"


def falls(model: nn.Module, optimizers: list[torch.optim.Optimizer], loss_of: object, steps: int) -> None:
    losses = []
    for i in range(steps):
        loss = loss_of(i)
        model.zero_grad()
        loss.backward()
        for o in optimizers:
            o.step()
        losses.append(float(loss.detach()))
    assert min(losses[-3:]) < losses[0], losses


def test_dit_learns_every_kind_of_batch(folder: Path) -> None:
    torch.manual_seed(0)
    model, pool = dit.VideoDiT(), dit.Pool(folder)
    model.spread.copy_(pool.spread())
    for kind in (dit.Kind(2, 1, 6, 1.0), dit.Kind(1, 8, 6, 1.0)):
        batch = pool.draw(kind, torch.Generator().manual_seed(0))
        assert batch.z.shape == (kind.clips, kind.frames, 64, 6, 6)
        falls(
            model,
            dit.optimizers(model, 1e-3),
            lambda _, b=batch: dit.loss_of(model, b, torch.ones(64, 1, 1), torch.Generator().manual_seed(0)),
            6,
        )


def test_decoder_learns(folder: Path) -> None:
    torch.manual_seed(0)
    codec = data.load_codec(folder)
    truth = codec_stage.crop(random.Random(0))[None]
    falls(
        codec,
        codec_stage.optimizers(codec.decoder, 1e-3),
        lambda _: codec_stage.loss_of(codec, truth, torch.Generator().manual_seed(0)),
        6,
    )


def test_prior_and_reader_learn(folder: Path) -> None:
    torch.manual_seed(0)
    prior = MotionPrior()
    path, words = prior_stage.draw(random.Random(0), 4, knots=12)
    tokens, knots = tokenize(path)
    falls(prior, [torch.optim.AdamW(prior.parameters(), 2e-3)], lambda _: prior.loss(tokens, knots, words), 8)
    seen = reader.stills(data.load_codec(folder), random.Random(0), 3)
    model = reader.Reader()
    aims = reader.targets(seen["words"], seen["poses"])
    falls(
        model,
        [torch.optim.AdamW(model.parameters(), 1e-3)],
        lambda _: reader.loss_of(model, seen["z"].float(), aims),
        8,
    )


def figures(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_a_run_keeps_its_place_in_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks a second a step: steps, minutes and rates go on where a killed run's last save was, with
    other draws, and the file holds what the run returned."""
    now = iter(range(10**6))
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(loop, "WARMUP", 1)
    seen: list[tuple[float, float]] = []

    def train(minutes: float) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)

        def loss_of(m: nn.Module, g: torch.Generator) -> Tensor:
            x = torch.randn(4, 2, generator=g)
            seen.append((float(x[0, 0]), optimizer.param_groups[0]["lr"]))
            return m(x).square().mean()

        return loop.run("toy", tmp_path, model, [optimizer], loss_of, lambda m: {"norm": 1.0}, minutes=minutes, every=1)

    train(2.0)
    assert len(seen) == torch.load(tmp_path / "toy.pt")["step"] == 120
    kept = train(10.0)
    state = torch.load(tmp_path / "toy.pt")
    assert (state["step"], state["elapsed"], len(seen)) == (600, 600.0, 600)
    assert [line["minutes"] for line in figures(tmp_path, "toy")] == [*map(float, range(1, 11))]
    assert [line["step"] for line in figures(tmp_path, "toy")] == [60 * i for i in range(1, 11)]
    assert not {x for x, _ in seen[:120]} & {x for x, _ in seen[120:]}, "the same draws again"
    rates = [lr for _, lr in seen[120:]]  # of ten minutes: full until the sixth, then falling to a fiftieth
    assert rates[:240] == pytest.approx([0.01] * 240)
    assert all(a > b for a, b in pairwise(rates[241:]))
    assert rates[-1] == pytest.approx(0.01 * (0.02 + 0.98 / 240))
    assert all(torch.equal(state["average"][k], v) for k, v in kept.state_dict().items())


def test_time_in_a_pause_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, naps = [0.0], []

    def nap(seconds: float) -> None:
        naps.append(len(steps))
        clock[0] += 500.0
        if len(naps) == 3:
            (tmp_path / "pause").unlink()

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(loop.time, "sleep", nap)
    monkeypatch.setattr(loop.time, "monotonic", tick)
    steps: list[int] = []
    (tmp_path / "pause").touch()
    run(tmp_path, 0.2, steps)
    assert naps == [0, 0, 0], "it went on while the file was there"
    assert torch.load(tmp_path / "toy.pt")["elapsed"] < 14


def test_a_killed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pt"
    loop.save(path, {"a": 1})

    def killed(state: object, file: Path) -> None:
        Path(file).write_bytes(b"half a check")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.save(path, {"a": 2})
    assert torch.load(path) == {"a": 1}


def test_making_data_goes_on_where_it_was(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("encoder.pt", "held.pt", "clips-0-000.pt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    data.make(tmp_path, shards=2, clips=1, latents=2)
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir() if p.name in before} == before
    assert capsys.readouterr().out.startswith("clips-0-001.pt")
    made = torch.load(tmp_path / "clips-0-001.pt")
    again = data.make_clips(data.load_codec(tmp_path), random.Random(1), 1, 2)
    assert all(torch.equal(made[k], again[k]) for k in again), "a shard's clips come from its number alone"
    pool = dit.Pool(tmp_path)
    assert pool.names == ["clips-0-000.pt", "clips-0-001.pt"]


def test_kept_latents_are_what_generating_asks_for(folder: Path) -> None:
    """Latents rendered at quarter size are those of the full-size picture, nearly; times and poses belong to them."""
    codec = data.load_codec(folder)
    rng, same = random.Random(8), random.Random(8)
    kept = data.make_clips(codec, rng, 1, 2)
    clip = Clip.draw(same)
    same.random(), same.uniform(0, 60)
    torch.testing.assert_close(clip.path(kept["times"][0].flatten()), kept["poses"][0].flatten(0, 1))
    assert kept["words"][0].tolist() == [SLOTS[s].index(clip.words[s]) for s in SLOTS]
    full, _ = render(clip, kept["times"][0, 1], margin=data.MARGIN)
    z = codec.project(codec.blocks(full[None]))[0, 0]
    assert (z - kept["z"][0, 1].float()).square().mean().sqrt() < 0.15 * z.std()


def test_every_stage_runs_resumes_and_ships(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of each stage, as the command line starts them; the shipped files make a pipeline."""
    small = (reader.stills, codec_stage.render)
    monkeypatch.setattr(reader, "stills", lambda codec, rng, count: small[0](codec, rng, min(count, 3)))
    monkeypatch.setattr(codec_stage, "FIRST", 2)
    monkeypatch.setattr(codec_stage, "CLIPS", 1)
    monkeypatch.setattr(codec_stage, "render", lambda clip, t, margin: small[1](clip, t, 112, 128, margin=margin))
    monkeypatch.setattr(prior_stage, "draw", lambda rng, count: draw_paths(rng, min(count, 4), 8))
    monkeypatch.setattr(prior_stage, "KNOTS", 8)
    for name in ("encoder.pt", "held.pt", "clips-0-000.pt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    kinds = (dit.Kind(1, 1, 6, 0.5), dit.Kind(1, 5, 6, 0.5))
    stages = {
        "codec": lambda m: codec_stage.train(tmp_path, tmp_path, m),
        "prior": lambda m: prior_stage.train(tmp_path, m),
        "reader": lambda m: reader.train(tmp_path, tmp_path, m),
        "dit": lambda m: dit.train(tmp_path, tmp_path, m, kinds=kinds),
    }
    for name, train in stages.items():
        train(1e-4)
        first = torch.load(tmp_path / f"{name}.pt")
        train(first["elapsed"] / 60 + 1e-4)
        assert torch.load(tmp_path / f"{name}.pt")["step"] > first["step"] >= 1
        lines = figures(tmp_path, name)
        assert lines[-1]["step"] > lines[0]["step"]
        assert all(math.isfinite(value) for line in lines for value in line.values())
    assert (tmp_path / "dit.png").exists()
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    result = CliRunner().invoke(stages_app, ["export", "--out", str(tmp_path), "--to", str(shipped)])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in shipped.iterdir()) == [f"{n}.safetensors" for n in sorted(stages)]
    monkeypatch.setitem(SIZES, "tiny", TINY)
    chunk = next(iter(Pipeline(shipped).stream(Request("red kite", seconds=0.2, size="tiny"))))
    assert len(chunk.frames) == 3
    assert chunk.latents.isfinite().all()


def test_the_encoder_comes_from_its_seed_alone_or_from_a_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = (data.encoder_of(data.fit_codec(random.Random(0), clips=2).state_dict()) for _ in range(2))
    assert all(torch.equal(first[k], again[k]) for k in first)
    codec = FOLDER / "codec.safetensors"
    monkeypatch.setattr(data, "held_out", lambda folder, codec: None)  # which takes its time
    data.make(tmp_path, shards=0, start_from=codec)
    kept, shipped = torch.load(tmp_path / "encoder.pt"), load_file(codec)
    assert kept.keys() == {"mean", "basis", "spread"}
    assert all(torch.equal(kept[k], shipped[k].float()) for k in kept)


def test_weights_of_another_encoder_are_not_put_beside_a_codec(tmp_path: Path) -> None:
    """A decoder can't read the latents of an encoder fitted anew, though every figure in training looks well."""
    out, to, codec = tmp_path / "out", tmp_path / "to", FOLDER / "codec.safetensors"
    out.mkdir()
    to.mkdir()
    (to / codec.name).write_bytes(codec.read_bytes())
    loop.save(out / "encoder.pt", data.encoder_of(load_file(codec)))
    loop.save(out / "dit.pt", {"average": VideoDiT().state_dict(), "step": 1, "elapsed": 60.0})
    export = ["export", "--out", str(out), "--to", str(to)]
    assert CliRunner().invoke(stages_app, export).exit_code == 0
    other = torch.load(out / "encoder.pt")
    other["basis"][:, 7] *= -1
    loop.save(out / "encoder.pt", other)
    (to / "dit.safetensors").unlink()
    result = CliRunner().invoke(stages_app, export)
    assert result.exit_code == 2
    assert "another encoder" in result.output
    assert not (to / "dit.safetensors").exists()


def test_crops_show_something() -> None:
    rng = random.Random(0)
    crops = torch.stack([codec_stage.crop(rng) for _ in range(3)])
    assert crops.shape == (3, 8, 3, codec_stage.CROP, codec_stage.CROP)
    assert crops.isfinite().all()
    assert crops.flatten(1).std(1).min() > 0.02


def test_noise_levels_are_one_a_chunk() -> None:
    t = dit.noise_levels(4000, 8, 4, torch.Generator().manual_seed(0))
    assert t.shape == (4000, 8)
    assert torch.equal(t[:, 1], t[:, 3])
    assert torch.equal(t[:, 4], t[:, 7])
    given = t[:, 0] == 0
    assert given.float().mean() == pytest.approx(0.2, abs=0.03)
    assert torch.equal(t[~given, 0], t[~given, 1])
    assert t[:, 4:].min() >= 0.02
    assert t.max() <= 0.999
    assert (t[:, 1] < 0.15).float().mean() > 0.6, "the past is mostly clean, as it is when generating"
