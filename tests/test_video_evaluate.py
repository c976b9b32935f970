"""The judge: the truth is perfect, the baselines are what they claim, a wrong colour is called wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from types import SimpleNamespace

import pytest
import torch

from hhattn.video.cli import evaluate
from hhattn.video.evaluate import judge, measure, prompts, psnr
from hhattn.video.generate import Chunk, Pipeline, Request
from hhattn.video.model import Config
from hhattn.video.text import SLOTS, Prompt, parse
from hhattn.video.world import Clip, Path, render, scene_picture

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


@pytest.mark.parametrize("subject", SLOTS["subject"])
def test_every_colour_of_every_subject_is_told_apart(subject: str) -> None:
    """Shown in one colour and asked about each: only the true one is right."""
    words = {**WORDS, "subject": subject, "scene": "night"}
    for shown in ("white", "pink"):
        picture, _ = scene_picture({**words, "color": shown}, POSE, 1.5, 72, 128)
        right = [asked for asked in SLOTS["color"] if judge(picture, {**words, "color": asked}, POSE, 1.5).color_right]
        assert right == [shown]


def test_the_baselines_are_what_they_say() -> None:
    """They depend on the truth alone, and a wrong colour costs less than no subject."""
    truth, _ = scene_picture(WORDS, POSE, 1.5, *SIZE)
    good, bad = judge(truth, WORDS, POSE, 1.5), judge(torch.rand_like(truth), WORDS, POSE, 1.5)
    assert (good.box_no_subject, good.box_wrong_color) == (bad.box_no_subject, bad.box_wrong_color)
    assert good.box_no_subject < good.box_wrong_color < 30
    assert bad.box < good.box_no_subject
    noisy = (truth + 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    figures = judge(noisy, WORDS, POSE, 1.5)
    assert figures.full == pytest.approx(26, abs=0.7), "20 dB a factor of ten"
    assert figures.box == pytest.approx(26, abs=0.7)


def test_errors_elsewhere_are_the_backgrounds() -> None:
    truth, _ = scene_picture(WORDS, POSE, 1.5, *SIZE)
    spoiled = truth.clone()
    spoiled[..., :40] = 0
    figures = judge(spoiled, WORDS, POSE, 1.5)
    assert figures.box > 60
    assert figures.background < figures.full < 30


class Stub:
    """A pipeline that films the world itself, with a jump of brightness at each border of chunks if asked."""

    def __init__(self, jump: float = 0.0):
        self.jump, self.dit, self.decoded = jump, SimpleNamespace(config=Config()), []

    def understand(self, request: Request) -> Prompt:
        return parse(request.prompt, request.seed)

    def stream(self, request: Request, wanted: Callable[[int], bool]) -> Iterator[Chunk]:
        clip = Clip(
            words := self.understand(request).words, Path.draw(random.Random(0), words["motion"], words["camera"])
        )
        done = index = 0
        while done < request.frames:
            count, lead = 4, 3 * (index == 0)
            t = (done - lead + torch.arange(4 * count)).clamp(min=0) / request.fps
            n = min(4 * count - lead, request.frames - done)
            frames = torch.empty(0, 90, 160, 3, dtype=torch.uint8)
            if wanted(index):
                self.decoded.append(index)
                picture = render(clip, t[lead:][:n], 90, 160)[0] * (1 - self.jump * (index % 2))
                frames = (picture.permute(0, 2, 3, 1) * 255).round().byte()
            yield Chunk(index, frames, torch.zeros(1, count, 1, 1, 1), clip.path(t).view(count, 4, 4), {})
            done, index = done + n, index + 1


@pytest.mark.parametrize("fps", [8.0, 16.0, 24.0])
def test_measuring_the_world_itself(fps: float) -> None:
    """Every mark is judged, at its own frame, words and pose; only chunks at the marks and before them are decoded."""
    stub, marks = Stub(), (1.0, 5.0, 7.5)
    figures, steady = measure(stub, Request("red ball looping sunset panning", seconds=7.5, fps=fps), marks)
    assert [f.seconds for f in figures] == pytest.approx(marks, abs=16 / fps)
    assert figures[-1].seconds == pytest.approx(7.5 - 1 / fps, abs=0.006)
    for f in figures:
        assert f.box > 35, "rounding to a byte and halving, no more"
        assert f.color_right
        assert f.position_error < 0.003
    chunks = -(-(7.5 * fps + 3) // 16)
    assert len(stub.decoded) == len(set(stub.decoded)) <= min(6, chunks)
    assert steady.seam_ratio == pytest.approx(1, abs=0.2)
    assert steady.motion > 0.05
    assert steady.jitter < 0.1 * 16 / fps


def test_seams_show() -> None:
    request = Request("red ball looping sunset still", seconds=5.0)
    smooth, broken = (measure(Stub(jump), request, (3.0, 5.0))[1].seam_ratio for jump in (0.0, 0.1))
    assert broken > 3 * smooth


def test_a_whole_evaluation(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hhattn.video.cli.Pipeline", lambda weights: Stub())
    out = tmp_path / "new" / "figures.json"
    evaluate(count=2, seconds=1.0, steps=1, weights=None, out=out, picture=None)
    report = json.loads(out.read_text())
    assert [c["prompt"] for c in report["clips"]] == [str(parse(p)) for p in prompts(2)]
    assert all([f["color_right"] for f in c["at"]] == [True] for c in report["clips"])


def test_the_bundled_model_draws_what_is_asked() -> None:
    """Far above the trivial baselines, in the right colour and at the right place."""
    figures, steady = measure(Pipeline(), Request("blue rocket looping ocean panning", seconds=1.0, size="180x320"))
    (f,) = figures
    assert f.box > f.box_wrong_color + 3 > f.box_no_subject + 3
    assert f.color_right
    assert f.position_error < 0.01
    assert f.background > 24
    assert steady.jitter < 0.3
