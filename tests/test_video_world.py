"""The procedural world: what it draws is the truth that all else is judged by, so it has to agree with itself."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hhattn.video.text import SLOTS, parse
from hhattn.video.world import CAMERA_PERIOD, COLORS, RADIUS, REACH, Clip, Path, paint, render, scene_picture

H, W = 90, 160
TIMES = torch.tensor([0.0, 0.4, 1.3, 5.9])


def clip_of(seed: int = 0, **words: str) -> Clip:
    return Clip.draw(random.Random(seed), **words)


def grid(h: int = H, w: int = W) -> tuple[Tensor, Tensor]:
    """Pixel centres x [1, w] and y [1, h] in frame heights."""
    return (torch.arange(w)[None] + 0.5) / h, (torch.arange(h)[None] + 0.5) / h


def decibels(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10(max(float((a - b).square().mean()), 1e-12))


def test_a_seed_is_a_clip() -> None:
    assert clip_of(3) == clip_of(3)
    assert clip_of(3) != clip_of(4)
    for a, b in zip(render(clip_of(3), TIMES, H, W), render(clip_of(3), TIMES, H, W), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(render(clip_of(3), TIMES, H, W)[0], render(clip_of(4), TIMES, H, W)[0])


@pytest.mark.parametrize("scene", SLOTS["scene"])
@pytest.mark.parametrize("subject", SLOTS["subject"])
def test_every_subject_in_every_scene(scene: str, subject: str) -> None:
    clip = clip_of(scene=scene, subject=subject)
    picture, cover = render(clip, TIMES, H, W)
    assert picture.shape == (4, 3, H, W)
    assert cover.shape == (4, H, W)
    for x in (picture, cover):
        assert x.isfinite().all()
        assert (x >= 0).all()
        assert (x <= 1).all()
    x, y = grid()
    away = clip.path(TIMES) + torch.tensor([9.0, 0, 0, 0])
    empty, nothing = paint([clip] * 4, away, TIMES, x.expand(4, -1), y.expand(4, -1), 1 / H)
    assert not nothing.any()
    outside = (cover == 0)[:, None].expand_as(picture)
    assert torch.equal(picture[outside], empty[outside]), "the subject paints outside its cover"
    inside = cover > 0.95
    assert (picture - empty).abs().mean(1)[inside].mean() > 0.08, "the subject can't be told from the scene"
    assert picture.flatten(2).std(-1).min() > 0.01


def test_every_word_shows() -> None:
    """Another word in any slot is another picture."""
    pose = torch.tensor([0.8, 0.45, 0.1, 1.0])
    words = {"color": "red", "subject": "ball", "motion": "floating", "scene": "meadow", "camera": "still"}
    for slot in ("color", "subject", "scene"):
        pictures = [scene_picture({**words, slot: w}, pose, 1.0, 45, 80)[0] for w in SLOTS[slot]]
        for i, a in enumerate(pictures):
            for b in pictures[:i]:
                assert (a - b).abs().max() > 0.05, slot
    paths = [replace(clip_of().path, motion=m)(TIMES) for m in SLOTS["motion"]]
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(paths) for b in paths[:i])
    for camera, travels in (("still", False), ("panning", True)):
        camera_path = clip_of(camera=camera).path(TIMES)[:, 3]
        assert (camera_path != camera_path[0]).any() == travels


@pytest.mark.parametrize("scene", SLOTS["scene"])
def test_a_crop_is_a_crop_of_the_whole(scene: str) -> None:
    clip = clip_of(7, scene=scene)
    whole, cover = render(clip, TIMES, H, W)
    rows, cols = slice(20, 61), slice(33, 100)
    x, y = grid()
    n = len(TIMES)
    poses = clip.path(TIMES, W / H)
    part, part_cover = paint([clip] * n, poses, TIMES, x[:, cols].expand(n, -1), y[:, rows].expand(n, -1), 1 / H)
    # matrix products of another size round differently
    torch.testing.assert_close(part, whole[..., rows, cols], rtol=0, atol=2e-5)
    torch.testing.assert_close(part_cover, cover[..., rows, cols], rtol=0, atol=2e-5)


def test_margin_adds_rows_and_keeps_the_rest() -> None:
    clip = clip_of(2, scene="space")
    plain, wide = render(clip, TIMES, H, W)[0], render(clip, TIMES, H, W, margin=8)[0]
    assert wide.shape[2] == H + 16
    torch.testing.assert_close(wide[:, :, 8:-8], plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scene", SLOTS["scene"])
def test_half_size_is_the_full_one_made_smaller(scene: str) -> None:
    """Shapes are anti-aliased: pixels twice as large hold the mean of what they cover, not a sample."""
    clip = clip_of(1, scene=scene)
    full, cover = render(clip, TIMES[:1], 2 * H, 2 * W)
    half, half_cover = render(clip, TIMES[:1], 2 * H, 2 * W, stride=2)
    mean = F.avg_pool2d(full, 2)
    assert decibels(half, mean) > 32
    assert decibels(half, mean) > decibels(full[..., ::2, ::2], mean) + 5, "no better than dropping pixels"
    assert (half_cover.sum() * 4 / cover.sum() - 1).abs() < 0.01


@pytest.mark.parametrize("subject", SLOTS["subject"])
def test_cover_lies_where_the_pose_says(subject: str) -> None:
    clip = clip_of(5, subject=subject, motion="looping")
    _, cover = render(clip, TIMES, H, W)
    poses = clip.path(TIMES, W / H)
    x, y = (g[0] for g in grid())
    for mask, (px, py, _, _) in zip(cover, poses.tolist(), strict=True):
        cx, cy = (mask.sum(0) * x).sum() / mask.sum(), (mask.sum(1) * y).sum() / mask.sum()
        # the balloon's basket and the kite's tail draw the centroid down, never farther than this
        assert math.hypot(cx - px, cy - py) < 0.2 * RADIUS
        reach = torch.hypot(x[None] - px, y[:, None] - py)[mask > 0.5].max()
        assert 0.8 * RADIUS < reach < REACH * RADIUS


def test_the_subject_turns_with_its_angle() -> None:
    """The picture at an angle is the upright one, turned: the rocket's long axis follows."""
    x, y = grid()
    for angle in (-0.3, 0.0, 0.25):
        pose = torch.tensor([[0.8, 0.5, angle, 0.0]])
        _, cover = paint([clip_of(subject="rocket")], pose, torch.zeros(1), x, y, 1 / H)
        dx, dy = (x[0] - 0.8)[None], (y[0] - 0.5)[:, None]
        xx, yy, xy = ((cover[0] * a).sum() for a in (dx * dx, dy * dy, dx * dy))
        axis = 0.5 * math.atan2(2 * xy, xx - yy)  # of the longest spread, from the x axis
        lean = (axis - math.copysign(math.pi / 2, axis)) if abs(axis) > math.pi / 4 else axis
        assert lean == pytest.approx(angle, abs=0.02)


@pytest.mark.parametrize("scene", ["meadow", "ocean"])
def test_a_moment_is_the_same_at_any_frame_rate(scene: str) -> None:
    clip = clip_of(4, scene=scene, camera="panning", subject="butterfly")
    at_16, at_24 = (render(clip, torch.arange(n) / fps, H, W)[0] for n, fps in ((5, 16), (7, 24)))
    for i, j in ((0, 0), (2, 3), (4, 6)):  # 0, 1/8 and 1/4 s
        torch.testing.assert_close(at_16[i], at_24[j], rtol=0, atol=1e-5)
    assert not torch.allclose(at_16[0], at_16[1], atol=1e-3)


@pytest.mark.parametrize("camera", SLOTS["camera"])
@pytest.mark.parametrize("scene", SLOTS["scene"])
def test_many_frames_at_once_are_the_single_ones(scene: str, camera: str) -> None:
    """A background that stands still is drawn once for a batch; that must not freeze one that moves."""
    clip = clip_of(6, scene=scene, camera=camera)
    together, _ = render(clip, TIMES, H, W)
    alone = torch.cat([render(clip, t[None], H, W)[0] for t in TIMES])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scene", SLOTS["scene"])
def test_the_panorama_closes(scene: str) -> None:
    pose = torch.tensor([0.5, 0.5, 0.0, 1.7])
    words = clip_of(scene=scene).words
    here = scene_picture(words, pose, 2.0, H, W)[0]
    round_, off = (scene_picture(words, pose + torch.tensor([0, 0, 0, d]), 2.0, H, W)[0] for d in (CAMERA_PERIOD, 2.4))
    assert decibels(here, round_) > 60
    assert decibels(here, off) < 40, "the camera's travel doesn't show"


def test_what_moves_by_itself_repeats_and_moves() -> None:
    words = clip_of(scene="ocean", subject="kite").words
    pose = torch.tensor([0.5, 0.5, 0.0, 0.0])
    a, b, c = (scene_picture(words, pose, t, H, W)[0] for t in (1.0, 7.0, 2.5))
    assert decibels(a, b) > 60
    assert decibels(a, c) < 40


def test_scene_picture_is_the_frame_of_the_clip() -> None:
    clip = clip_of(9)
    frames, covers = render(clip, TIMES, H, W)
    for t, pose, frame, cover in zip(TIMES, clip.path(TIMES), frames, covers, strict=True):
        picture, mask = scene_picture(clip.words, pose, float(t), H, W)
        torch.testing.assert_close(picture, frame, rtol=0, atol=2e-5)
        torch.testing.assert_close(mask, cover, rtol=0, atol=2e-5)


@pytest.mark.parametrize("motion", SLOTS["motion"])
@pytest.mark.parametrize("aspect", [16 / 9, 4 / 3])
def test_paths_are_smooth_and_stay_in_the_picture(motion: str, aspect: float) -> None:
    t = torch.arange(0, 60, 1 / 16)
    for seed in range(8):
        path = Path.draw(random.Random(seed), motion, "panning")
        p = path(t, aspect)
        assert p.isfinite().all()
        assert (p[:, 0] > 0).all()
        assert (p[:, 0] < aspect).all()
        assert (p[:, 1] > RADIUS).all()
        assert (p[:, 1] < 1 - RADIUS).all()
        assert torch.diff(p[:, :3], dim=0).abs().max() < 0.05, "a jump"
        assert p[:, :2].std(0).max() > 0.01, "no movement"


def test_captions_say_the_words() -> None:
    """A caption goes through the prompt's parser and comes out as the clip's words, for every word."""
    for slot, options in SLOTS.items():
        for word in options:
            clip = clip_of(11, **{slot: word})
            prompt = parse(clip.caption())
            assert prompt.words == clip.words
            assert prompt.chosen == ()
    assert set(COLORS) == set(SLOTS["color"])
