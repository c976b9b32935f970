"""Training: every loss falls, a killed run resumes, a pause stands still, a save is whole or not at all."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hhattn.video.codec import Codec
from hhattn.video.prior import MotionPrior, tokenize
from hhattn.video.train import codec as codec_stage
from hhattn.video.train import data, dit, loop, reader
from hhattn.video.train import prior as prior_stage
from hhattn.video.train.muon import Muon, orthogonalize
from hhattn.video.weights import store


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
    loop.save(out / "encoder.pt", {k: v for k, v in codec.state_dict().items() if "decoder" not in k})
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
