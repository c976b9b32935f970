"""The motion prior: tokens that rebuild a path, draws that obey their settings, a spline without corners."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from video_models import wake

from hhattn.video import weights
from hhattn.video.prior import (
    CENTRE,
    CONTEXT,
    KNOT_SECONDS,
    LEVELS,
    RANGES,
    MotionPrior,
    Sampling,
    interpolate,
    levels,
    predict,
    tokenize,
)
from hhattn.video.train.prior import draw
from hhattn.video.world.motion import PAN_SPEED

WORDS = torch.tensor([[2, 1], [0, 0]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def untrained() -> MotionPrior:
    torch.manual_seed(0)
    return wake(MotionPrior(dim=16, layers=2, heads=2)).eval()


def half_steps(order: int) -> Tensor:
    """The largest rounding error of each channel."""
    return torch.stack([torch.diff(levels(order, c)).max() / 2 for c in range(4)])


def test_tokens_rebuild_the_path() -> None:
    """Rounding errors never add up: after a minute a knot is off by no more than one rounding."""
    path, _ = draw(random.Random(0), 200, 120)
    tokens, knots = tokenize(path)
    assert tokens.shape == knots.shape == (200, 120, 4)
    assert tokens.min() >= 0
    assert tokens.max() < LEVELS
    moved = knots[:, :1, 3] - path[:, :1, 3]
    assert (moved.abs() <= half_steps(0)[3] + 1e-5).all()
    path = torch.cat([path[..., :3], (path[..., 3] + moved)[..., None]], -1)
    error = (knots - path).abs().amax(0)
    for i in range(3):
        assert (error[i] <= half_steps(i) + 1e-5).all()
    assert (error[3:] <= half_steps(2) + 1e-4).all()
    assert error[6:, :2].mean() < 3e-3, "two pixels of 720"


@pytest.mark.parametrize("camera", [0, 1])
def test_the_cameras_steps_say_how_it_moves(camera: int) -> None:
    """From the second knot on, whatever the panorama's place: a still camera's tokens are the zero level, a panning
    one's steps are its speed. What the tokens don't tell, the prior can't learn."""
    path, words = draw(random.Random(0), 200, 12)
    tokens, knots = tokenize(path[words[:, 1] == camera])
    speed = torch.diff(knots[..., 3], dim=1) / KNOT_SECONDS
    if camera == 0:
        assert (tokens[:, 1:, 3] == LEVELS // 2).all()
    else:
        torch.testing.assert_close(speed.abs(), torch.full_like(speed, PAN_SPEED), rtol=0.06, atol=0)


def test_tokens_alone_are_the_knots() -> None:
    """What a decoder adds up from tokens is what tokenize says they reconstruct."""
    path, _ = draw(random.Random(1), 4, 20)
    tokens, knots = tokenize(path)
    values = [torch.stack([levels(min(i, 2), c)[tokens[:, i, c]] for c in range(4)], -1) for i in range(20)]
    built = [CENTRE + values[0]]
    built.append(built[0] + values[1])
    for i in range(2, 20):
        built.append(2 * built[-1] - built[-2] + values[i])
    torch.testing.assert_close(torch.stack(built, 1), knots, rtol=0, atol=1e-5)


def test_standing_still_is_exact() -> None:
    """The middle level is zero: a path that stands still doesn't creep."""
    for order in (0, 1, 2):
        for channel in range(4):
            values = levels(order, channel)
            assert values[LEVELS // 2] == 0
            assert (torch.diff(values) > 0).all()
            assert values[-1] == RANGES[order, channel]
    still = torch.tensor([1.0, 0.5, 0.1, 3.0]).expand(1, 10, 4)
    _, knots = tokenize(still)
    assert (torch.diff(knots[:, 6:], dim=1).abs() < 2e-3).all()


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_predict_carries_on(n: int) -> None:
    line = torch.arange(8.0)[None, :, None] * torch.tensor([0.01, 0.02, 0.03, 0.04]) + 0.3
    order, base = predict(line[:, :n])
    assert order == min(n, 2)
    if n == 0:
        assert torch.equal(base, CENTRE[None])
    elif n == 1:
        assert torch.equal(base, line[:, 0])
    else:
        torch.testing.assert_close(base, line[:, n])


def test_temperature_zero_is_the_likeliest() -> None:
    model = untrained()
    knots = torch.zeros(2, 0, 4)
    a, b = (model.extend(knots, WORDS, 12, Sampling(temperature=0), generator(s)) for s in (1, 2))
    assert torch.equal(a, b)
    c = model.extend(knots, WORDS, 12, Sampling(temperature=1, top_k=1), generator(3))
    assert torch.equal(a, c)
    d, e = (model.extend(knots, WORDS, 12, Sampling(temperature=1), generator(s)) for s in (1, 2))
    assert not torch.equal(d, e)


def frequencies(sampling: Sampling, p: Tensor, n: int = 20000) -> Tensor:
    drawn = sampling.draw(p.log().expand(n, -1), generator())
    return torch.bincount(drawn, minlength=len(p)) / n


P = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


def test_draws_follow_the_distribution() -> None:
    torch.testing.assert_close(frequencies(Sampling(1.0, 0, 1.0), P), P, rtol=0, atol=0.015)
    sharper = P.square() / P.square().sum()
    torch.testing.assert_close(frequencies(Sampling(0.5, 0, 1.0), P), sharper, rtol=0, atol=0.015)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0, 2, 1.0), [1, 3]),
        (Sampling(1.0, 99, 1.0), [0, 1, 2, 3, 4]),
        (Sampling(1.0, 0, 0.3), [1]),
        (Sampling(1.0, 0, 0.6), [1, 3]),
        (Sampling(1.0, 0, 0.84), [1, 3, 4]),
        (Sampling(1.0, 3, 0.6), [1, 3]),
        (Sampling(1.0, 1, 0.84), [1]),
        (Sampling(1.0, 0, 1e-6), [1]),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(sampling: Sampling, kept: list[int]) -> None:
    """top-p keeps the fewest tokens that hold at least that share."""
    expected = torch.zeros(5)
    expected[kept] = P[kept] / P[kept].sum()
    torch.testing.assert_close(frequencies(sampling, P), expected, rtol=0, atol=0.015)
    assert (frequencies(sampling, P) > 0).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": float("nan")}, "top_p=nan"),
    ],
)
def test_sampling_refuses(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("pieces", [(3, 9), (1,) * 12, (0, 12, 0)])
def test_extending_in_pieces_is_extending_at_once(pieces: tuple[int, ...]) -> None:
    model, g = untrained(), generator(5)
    knots = torch.zeros(2, 0, 4)
    whole = model.extend(knots, WORDS, 12, Sampling(), generator(5))
    for n in pieces:
        knots = model.extend(knots, WORDS, n, Sampling(), g)
    assert torch.equal(knots, whole)


def test_extending_goes_on_past_the_context() -> None:
    """Only the last knots matter, so a path may be as long as it likes; what it began with is forgotten."""
    model = untrained()
    start, _ = draw(random.Random(2), 2, 2 * CONTEXT + 3)
    piece = model.extend(start, WORDS, 4, Sampling(), generator(1))
    shorter = model.extend(start[:, 2:], WORDS, 4, Sampling(), generator(1))
    assert torch.equal(piece[:, -4:], shorter[:, -4:])
    assert torch.equal(piece[:, : start.shape[1]], start)


def test_no_state_sees_the_future() -> None:
    model = untrained()
    knots, _ = draw(random.Random(3), 2, 10)
    other = knots.clone()
    other[:, 6:] += 0.1
    with torch.no_grad():
        a, b = model.features(knots, WORDS), model.features(other, WORDS)
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=0, atol=1e-6)
    assert (a - b)[:, 7:].abs().amax(-1).min() > 1e-4


def test_words_and_knots_change_what_comes() -> None:
    model = untrained()
    knots, _ = draw(random.Random(4), 1, 5)
    with torch.no_grad():
        states = [model.features(knots, torch.tensor([w]))[:, -1] for w in ((0, 0), (1, 0), (0, 1))]
        moved = model.features(knots + 0.05, torch.tensor([[0, 0]]))[:, -1]
    for other in (*states[1:], moved):
        assert (states[0] - other).abs().max() > 1e-3


def test_loss_is_that_of_the_draws() -> None:
    """The training loss is the mean negative log likelihood of the tokens under the very logits that draws use."""
    model = untrained()
    path, words = draw(random.Random(5), 2, 6)
    tokens, knots = tokenize(path)
    total = 0.0
    with torch.no_grad():
        for i in range(6):
            x = model.features(knots[:, :i], words)[:, -1] if i else model.features(knots[:, :1], words)[:, 0]
            for c in range(4):
                logits = model.logits(x, [tokens[:, i, j] for j in range(c)], torch.full((2,), min(i, 2)))
                total -= logits.log_softmax(-1).gather(-1, tokens[:, i, c, None]).mean().item() / 24
        assert model.loss(tokens, knots, words).item() == pytest.approx(total, rel=1e-4)


def test_gradients_reach_every_parameter() -> None:
    model = untrained().train()
    path = torch.cat([draw(random.Random(seed), 40, 60)[0] for seed in range(2)])
    words = torch.cat([draw(random.Random(seed), 40, 60)[1] for seed in range(2)])
    tokens, knots = tokenize(path)
    model.loss(tokens, knots, words).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_the_spline_passes_through_its_knots() -> None:
    knots = torch.randn(2, 9, 4, generator=generator())
    t = torch.arange(9) * KNOT_SECONDS
    torch.testing.assert_close(interpolate(knots, t), knots, rtol=1e-5, atol=1e-6)


def test_the_spline_has_no_corners() -> None:
    knots = torch.randn(1, 9, 4, generator=generator(), dtype=torch.float64)
    eps = 1e-6
    for i in range(1, 8):
        before, at, after = interpolate(knots, i * KNOT_SECONDS + torch.tensor([-eps, 0, eps], dtype=torch.float64))[0]
        torch.testing.assert_close(after - at, at - before, rtol=0, atol=1e-4 * eps)
    fine = interpolate(knots, torch.linspace(0, 4, 4001, dtype=torch.float64))
    slope = torch.diff(fine, dim=1) * 1000
    assert torch.diff(slope, dim=1).abs().max() < 0.1 * slope.abs().max()


def test_the_spline_of_a_line_is_the_line() -> None:
    """At both ends too, where a neighbour is missing."""
    t = torch.linspace(0, 3.9, 50)
    knots = (torch.arange(9) * KNOT_SECONDS)[None, :, None].expand(1, 9, 4)
    torch.testing.assert_close(interpolate(knots, t), t[None, :, None].expand(1, 50, 4))


def test_the_spline_needs_one_knot_more_and_no_others() -> None:
    """What is already shown doesn't change when the path goes on."""
    knots = torch.randn(1, 12, 4, generator=generator())
    t = torch.linspace(0, 2.9, 40)  # within knots 0..5, so knot 7 is the last that is looked at
    assert torch.equal(interpolate(knots[:, :8], t), interpolate(knots, t))


def test_the_bundled_prior_does_what_the_words_say() -> None:
    """A still camera stands, a panning one keeps the world's speed, and subjects stay in the picture."""
    prior = MotionPrior()
    weights.load({"prior": prior})
    words = torch.tensor([[motion, camera] for motion in range(5) for camera in range(2)])
    knots = prior.extend(torch.zeros(10, 0, 4), words, 60, Sampling(), generator())
    speed = torch.diff(knots[:, 4:, 3], dim=1).abs().mean(1) / KNOT_SECONDS
    torch.testing.assert_close(speed, PAN_SPEED * words[:, 1].float(), rtol=0, atol=0.006)
    assert (knots[..., 0] > 0).all()
    assert (knots[..., 0] < 16 / 9).all()
    assert (knots[..., 1] > 0.1).all()
    assert (knots[..., 1] < 0.9).all()
    assert knots[..., :2].std(1).amax(1).min() > 0.015, "a subject stands still"
