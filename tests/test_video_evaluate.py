"""The judge: the truth is perfect, the baselines are what they claim, a wrong colour is called wrong."""

from __future__ import annotations

import pytest
import torch

from hhattn.video.evaluate import judge, prompts, psnr
from hhattn.video.text import SLOTS, parse
from hhattn.video.world import scene_picture

WORDS = {"color": "red", "subject": "balloon", "motion": "gliding", "scene": "meadow", "camera": "still"}
POSE = torch.tensor([0.8, 0.45, 0.05, 2.0])
SIZE = (180, 320)


def test_the_truth_is_perfect() -> None:
    truth, _ = scene_picture(WORDS, POSE, 1.5, *SIZE)
    figures = judge(truth, WORDS, POSE, 1.5)
    assert min(figures.box, figures.full, figures.background) > 60
    assert figures.color_right
    assert figures.color_error < 1e-5
    assert figures.position_error < 1e-5


def test_a_missing_subject_scores_the_baseline() -> None:
    away = POSE.clone()
    away[1] = -5.0
    empty, cover = scene_picture(WORDS, away, 1.5, *SIZE)
    assert cover.sum() == 0
    figures = judge(empty, WORDS, POSE, 1.5)
    assert figures.box == pytest.approx(figures.box_no_subject)
    assert figures.box < 16


@pytest.mark.parametrize("color", [c for c in SLOTS["color"] if c != WORDS["color"]])
def test_a_wrong_colour_is_called_wrong(color: str) -> None:
    other, _ = scene_picture({**WORDS, "color": color}, POSE, 1.5, *SIZE)
    figures = judge(other, WORDS, POSE, 1.5)
    assert not figures.color_right
    assert figures.color_error > 0.02


def test_a_displaced_subject_is_found_where_it_is() -> None:
    moved = POSE + torch.tensor([0.06, 0.0, 0.0, 0.0])
    picture, _ = scene_picture(WORDS, moved, 1.5, *SIZE)
    assert judge(picture, WORDS, POSE, 1.5).position_error == pytest.approx(0.06, abs=0.015)


def test_psnr_by_hand() -> None:
    a = torch.zeros(3, 4, 4)
    assert psnr(a, a + 0.1) == pytest.approx(20.0, abs=1e-4)
    mask = torch.zeros(4, 4)
    mask[0] = 1
    b = a.clone()
    b[:, 1:] = 1.0  # outside the mask
    b[:, 0] = 0.01
    assert psnr(a, b, mask) == pytest.approx(40.0, abs=1e-3)


def test_prompts_use_every_subject_and_scene() -> None:
    words = [parse(p).words for p in prompts(8)]
    for slot in ("subject", "scene"):
        assert {w[slot] for w in words} == set(SLOTS[slot])
    assert prompts(8) == prompts(8)
