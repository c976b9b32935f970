"""Words to frames: seeds, lengths, sizes, the first picture, and what is held in memory meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from video_models import HALF, TINY, cut, inputs, small_dit, tensors_of, untrained_pipeline, write_untrained

from hhattn.video import weights
from hhattn.video.generate import Chunk, Pipeline, Request
from hhattn.video.model import Condition, Memory
from hhattn.video.presets import SIZES, Size
from hhattn.video.prior import Sampling
from hhattn.video.sampler import levels, sample_chunk
from hhattn.video.text import PromptError, parse

NARROW = Size((48, 64), (48, 64))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return untrained_pipeline(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def _sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("tiny", TINY), ("half", HALF), ("narrow", NARROW)):
        monkeypatch.setitem(SIZES, name, size)


def request(seconds: float = 1.0, size: str = "tiny", **settings: object) -> Request:
    return Request("red kite looping ocean panning", seconds=seconds, size=size, **settings)


def film(pipeline: Pipeline, wish: Request, picture: Tensor | None = None) -> Tensor:
    return torch.cat([chunk.frames for chunk in pipeline.stream(wish, picture)])


@pytest.mark.parametrize(("seconds", "fps", "lens"), [
    (1.0, 16, [13, 3]),
    (2.5, 16, [13, 16, 11]),
    (1.0, 24, [13, 11]),
    (0.01, 8, [1]),
    (13 / 16, 16, [13]),
    (29 / 16, 16, [13, 16]),
])  # fmt: skip
def test_frames_come_in_chunks(pipeline: Pipeline, seconds: float, fps: float, lens: list[int]) -> None:
    chunks = list(pipeline.stream(request(seconds, fps=fps)))
    assert [len(c.frames) for c in chunks] == lens
    assert sum(lens) == request(seconds, fps=fps).frames
    assert [c.index for c in chunks] == list(range(len(lens)))
    for c in chunks:
        assert c.frames.dtype == torch.uint8
        assert c.frames.shape[1:] == (*TINY.output, 3)
        assert c.latents.shape[1] == pipeline.dit.config.chunk, "no other length was trained"
        assert c.poses.shape == (c.latents.shape[1], 4, 4)
        assert c.latents.isfinite().all()
        assert set(c.seconds) == {"motion", "denoise", "decode"}


def test_a_seed_is_a_film(pipeline: Pipeline) -> None:
    a, b, c = (film(pipeline, request(seed=s)) for s in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_clip_does_not_depend_on_its_length(pipeline: Pipeline) -> None:
    """The first second of one second is that of two and of three, bit for bit."""
    short, long, longer = (film(pipeline, request(s, seed=3)) for s in (1, 2, 3))
    assert torch.equal(short, long[:16])
    assert torch.equal(long, longer[:32])


def test_chunks_that_are_not_wanted_change_nothing(pipeline: Pipeline) -> None:
    """They come without frames, and the ones that are wanted are what they were, the decoder's past included."""
    every = list(pipeline.stream(request(3.5)))
    some = list(pipeline.stream(request(3.5), wanted=lambda index: index in (0, 2, 3)))
    assert [len(c.frames) for c in some] == [13, 0, 16, 11]
    for a, b in zip(every, some, strict=True):
        assert torch.equal(a.latents, b.latents)
        # a convolution over another number of pictures rounds differently, which may tip a byte
        assert b.index == 1 or (a.frames.int() - b.frames.int()).abs().max() <= 1


def test_a_path_goes_on_though_its_past_is_forgotten(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two and a half minutes with only so many knots kept are the path with all of them kept."""

    def skipped(model: nn.Module, cond: Condition, empty: object, noise: Tensor, *_: object, **__: object) -> object:
        return noise, None

    monkeypatch.setattr("hhattn.video.generate.sample_chunk", skipped)
    wish, paths, kept = request(150.0, fps=8), [], []
    whole = pipeline.prior.extend

    def counted(knots: Tensor, *args: object) -> Tensor:
        kept.append(knots.shape[1])
        return whole(knots, *args)

    monkeypatch.setattr(pipeline.prior, "extend", counted)
    for context in (48, 10**9):
        monkeypatch.setattr("hhattn.video.generate.CONTEXT", context)
        paths.append(torch.cat([c.poses for c in pipeline.stream(wish, wanted=lambda _: False)]))
        assert (max(kept) <= 4 * 48) == (context == 48)
    torch.testing.assert_close(paths[0], paths[1], rtol=0, atol=1e-3)


def test_draws_are_settings(pipeline: Pipeline) -> None:
    """Temperature, noise, steps and guidance each reach the frames; temperature 0 takes the chance out of the path."""
    base = film(pipeline, request())
    for change in ({"noise": 0.9}, {"steps": 2}, {"guidance": 3.0}, {"sampling": Sampling(2.0, 0, 1.0)}):
        assert not torch.equal(base, film(pipeline, request(**change))), change
    still = Sampling(temperature=0)
    a, b = (next(iter(pipeline.stream(request(sampling=still, seed=s)))).poses for s in (1, 2))
    assert torch.equal(a, b)


def test_small_sizes_are_the_large_one_made_smaller(pipeline: Pipeline) -> None:
    large, small = film(pipeline, request(size="tiny")), film(pipeline, request(size="half"))
    assert small.shape[1:] == (*HALF.output, 3)
    mean = F.avg_pool2d(large.permute(0, 3, 1, 2).float(), 2)
    assert (small.permute(0, 3, 1, 2).float() - mean).abs().max() <= 1


def test_what_is_cropped_is_the_margin(pipeline: Pipeline) -> None:
    """48 rows are drawn as 64; the middle 48 are shown."""
    chunk = next(iter(pipeline.stream(request())))
    whole, _ = pipeline.codec.decode(chunk.latents)
    middle = (whole[0, :, :, 8:56].clamp(0, 1) * 255).permute(0, 2, 3, 1)
    assert (middle[:16] - chunk.frames.float()).abs().max() < 0.51


@pytest.mark.parametrize("size", sorted(SIZES))
def test_sizes_fit_the_grid(size: str) -> None:
    s = SIZES[size]
    rows, cols = s.grid
    assert size == "x".join(str(n) for n in s.output)
    assert rows * 32 == s.native[0] + 2 * s.margin
    assert cols * 32 == s.native[1]
    assert s.native[0] % s.output[0] == s.native[1] % s.output[1] == 0
    assert s.aspect == s.output[1] / s.output[0]


def held() -> int:
    """Bytes of every real tensor that is alive. Fake ones, which other tests' compilations leave, have no storage, nor
    have torch.func's wrappers."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    tensors = [t for t in tensors if not is_functorch_wrapped_tensor(t)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_does_not_grow_with_the_clip(pipeline: Pipeline) -> None:
    """All tensors alive after chunk 3 and after chunk 9: the path keeps 16 bytes a knot, nothing else is kept."""
    sizes = {chunk.index: held() for chunk in pipeline.stream(request(9.5)) if chunk.index in (2, 8)}
    assert sizes[8] - sizes[2] <= 6 * 2 * 16 + 64, sizes
    assert sizes[2] > 1e6, "the weights at least are alive, or nothing was measured"


def test_memory_is_handed_on(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk gets the memory that the one before left, and its size stays."""
    seen: list[tuple[Memory | None, Memory]] = []

    def watched(*args: object, **settings: object) -> tuple[Tensor, Memory]:
        z, memory = sample_chunk(*args, **settings)
        seen.append((args[4], memory))
        return z, memory

    monkeypatch.setattr("hhattn.video.generate.sample_chunk", watched)
    film(pipeline, request(4.0))
    assert len(seen) == 5
    assert seen[0][0] is None
    assert all(after[0] is before[1] for before, after in pairwise(seen))
    assert [m.frames for _, m in seen] == [4, 8, 12, 16, 20]
    assert len({m.bytes() for _, m in seen}) == 1
    assert all(sum(t.untyped_storage().nbytes() for t in tensors_of(m)) == m.bytes() for _, m in seen)


@pytest.mark.parametrize("size", ["tiny", "narrow"])
def test_a_picture_becomes_the_first_frame(pipeline: Pipeline, size: str) -> None:
    native = SIZES[size].native
    picture = torch.rand(3, *native, generator=torch.Generator().manual_seed(1))
    chunk: Chunk = next(iter(pipeline.stream(request(size=size), picture)))
    padded = F.pad(picture[None], (0, 0, 8, 8), mode="replicate")
    z, _ = pipeline.codec.encode(padded[None])
    assert torch.equal(chunk.latents[:, :1], z)
    first = pipeline.codec.decode(z)[0][0, 0, :, 8:-8].clamp(0, 1)
    assert (first * 255 - chunk.frames[0].permute(2, 0, 1).float()).abs().max() < 0.51
    read = pipeline.reader.read(z[0], 8).pose
    torch.testing.assert_close(chunk.poses[0, 0, : len(read.flatten()[:3])], read[:3])
    assert not torch.equal(film(pipeline, request(size=size)), film(pipeline, request(size=size), picture))


def test_words_left_open_are_read_off_the_picture(pipeline: Pipeline) -> None:
    picture = torch.rand(3, *TINY.native)
    seen = pipeline.reader.read(pipeline._encode(picture, TINY)[0]).words
    prompt = pipeline.understand(Request("looping", size="tiny"), picture)
    assert prompt.words["motion"] == "looping"
    assert {k: prompt.words[k] for k in seen} == seen
    assert prompt.chosen == ("camera",)
    silent = pipeline.understand(Request("", size="tiny"), picture)
    assert {k: silent.words[k] for k in seen} == seen
    other = next(w for w in ("red", "blue") if w != seen["color"])
    assert pipeline.understand(Request(other, size="tiny"), picture).words["color"] == other
    with pytest.raises(PromptError):
        pipeline.understand(Request("", size="tiny"))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (torch.rand(1, 3, 48, 96), r"picture has shape \(1, 3, 48, 96\); accepted: \(3, 48, 96\)"),
        (torch.rand(48, 96, 3), r"picture has shape \(48, 96, 3\)"),
        (torch.rand(3, 48, 95), r"picture has shape \(3, 48, 95\)"),
        (torch.zeros(3, 48, 96, dtype=torch.uint8), r"picture has dtype torch\.uint8; accepted: torch\.float32"),
        (torch.rand(3, 48, 96).half(), r"picture has dtype torch\.float16"),
        (torch.full((3, 48, 96), 128.0), "picture has values from 128 to 128; accepted: 0 to 1"),
        (torch.rand(3, 48, 96) - 0.5, "picture has values from -"),
        (torch.full((3, 48, 96), torch.nan), "picture has values from nan"),
    ],
)
def test_pictures_refused(pipeline: Pipeline, picture: Tensor, message: str) -> None:
    """At the call already, not at the first chunk."""
    with pytest.raises(ValueError, match=message):
        pipeline.stream(request(), picture)
    with pytest.raises(ValueError, match=message):
        pipeline.understand(request(), picture)


def test_words_are_refused_at_the_call(pipeline: Pipeline) -> None:
    with pytest.raises(PromptError, match="bloon"):
        pipeline.stream(Request("a red bloon", size="tiny"))


def test_times_of_pictures() -> None:
    """One picture in the first latent frame, four in every other; chunks join without a gap."""
    first, second = Pipeline._times(0, 4, 16), Pipeline._times(4, 4, 16)
    assert not first[0].any()
    shown = torch.cat([first[0, 3:], first[1:].flatten(), second.flatten()])
    torch.testing.assert_close(shown, torch.arange(29) / 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seconds": -1.0}, r"seconds=-1\.0; accepted: a number above 0"),
        ({"seconds": 0.0}, r"seconds=0\.0"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"seconds": float("inf")}, "seconds=inf"),
        ({"size": "8x8"}, "size='8x8'; accepted: .*720x1280"),
        ({"fps": 7.0}, r"fps=7\.0; accepted: 8 to 32"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"steps": 0}, "steps=0; accepted: 1 to 100"),
        ({"guidance": -0.5}, r"guidance=-0\.5; accepted"),
        ({"noise": 1.5}, r"noise=1\.5; accepted"),
        ({"seed": -1}, "seed=-1; accepted"),
        ({"seed": 10**20}, "seed=1000.*; accepted"),
    ],
)
def test_requests_refuse(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**settings)


def test_a_device_that_is_not_here(tmp_path: Path) -> None:
    for device in ("no-such", "xpu:99"):
        with pytest.raises(ValueError, match=f"device='{device}'; accepted"):
            Pipeline(tmp_path, device=device)


def test_tensors_are_made_where_the_pipeline_is(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that runs on the pipeline's device runs here with another device as torch's default: a tensor whose
    device nobody named would land there, and not mix with the rest."""
    picture = torch.rand(3, *TINY.native)
    wish = request(1.5, guidance=2.0)
    expected = film(pipeline, wish, picture)  # this makes the masks, too, which are kept
    with torch.device("meta"):
        assert torch.zeros(1).is_meta

    def elsewhere(whole: Callable[..., object], *args: object) -> object:
        with torch.device("meta"):
            return whole(*args)

    for name in ("_encode", "_mismatch", "_denoise", "_decode"):
        monkeypatch.setattr(pipeline, name, partial(elsewhere, getattr(pipeline, name)))
    assert torch.equal(film(pipeline, wish, picture), expected)


def test_the_largest_seed_works(pipeline: Pipeline) -> None:
    assert len(film(pipeline, request(0.1, seed=2**32 - 1))) == 2


@pytest.mark.parametrize("steps", [1, 2, 3, 17, 100])
def test_levels_fall(steps: int) -> None:
    got = levels(steps)
    assert len(got) == steps + 1
    assert got[0] == 0.999
    assert got[-1] == 0
    assert all(a > b for a, b in pairwise(got))


class Known(nn.Module):
    """A model that says ``guess + share·z`` for every condition, and remembers what it was asked."""

    def __init__(self, guess: Tensor, share: float = 0.0):
        super().__init__()
        self.guess, self.share = guess, share
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(
        self, z: Tensor, t: Tensor, cond: Condition, chunk: tuple[int, ...], memory: Memory | None
    ) -> tuple[Tensor, Memory]:
        self.asked.append((z, t))
        return self.guess + self.share * z, Memory([], len(self.asked))


def known(shape: tuple[int, ...] = (1, 2, 3, 2, 2)) -> tuple[Tensor, Tensor, Condition]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g), Condition(torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize("steps", [1, 4])
def test_a_sure_model_gets_its_way(steps: int) -> None:
    guess, noise, cond = known()
    model = Known(guess)
    x, memory = sample_chunk(model, cond, None, noise, None, steps=steps, guidance=1)
    torch.testing.assert_close(x, guess)
    assert len(model.asked) == steps + 1
    assert memory.frames == steps + 1, "the memory is that of the last pass, over the clean chunk"
    torch.testing.assert_close(model.asked[-1][0], guess)
    assert (model.asked[-1][1] < 0.05).all()
    for (z, t), level in zip(model.asked, levels(steps)[:-1], strict=False):
        assert (t == torch.tensor(level)).all()
        torch.testing.assert_close(z, guess + (noise - guess) * (level / 0.999), rtol=1e-4, atol=1e-5)


def test_euler_steps_are_those_of_the_flow() -> None:
    """With x0 = share·x the flow has a closed form in each step: x <- x·(share + (1 - share)·t'/t)."""
    _, noise, cond = known()
    x, _ = sample_chunk(Known(torch.zeros_like(noise), 0.4), cond, None, noise, None, steps=3, guidance=1)
    expected = noise
    for t, after in pairwise(levels(3)):
        expected = expected * (0.4 + 0.6 * after / t)
    torch.testing.assert_close(x, expected)


def test_a_given_first_frame_is_kept_exactly() -> None:
    guess, noise, cond = known()
    first, model = torch.full((1, 1, 3, 2, 2), 0.123), Known(guess)
    x, _ = sample_chunk(model, cond, None, noise, None, steps=3, guidance=1, first=first)
    assert torch.equal(x[:, :1], first)
    torch.testing.assert_close(x[:, 1:], guess[:, 1:])
    for i, (z, t) in enumerate(model.asked):
        assert torch.equal(z[:, :1], first), "every pass sees the picture as it is"
        assert i == 3 or not t[:, 0].any(), "and knows that it is clean"


def test_guidance() -> None:
    """1 is no guidance, bit for bit; other values go from what is drawn without words past what is drawn with them."""
    model = small_dit()
    z, _, cond = inputs(model, 3)
    _, _, empty = inputs(model, 3, seed=7)
    plain, alone, one, same, two, none = (
        sample_chunk(model, c, e, z, None, steps=1, guidance=g)[0]
        for c, e, g in ((cond, None, 1), (empty, None, 1), (cond, empty, 1), (cond, cond, 5), (cond, empty, 2),
                        (cond, empty, 0))
    )  # fmt: skip
    assert torch.equal(plain, one)
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(none, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two, alone + 2 * (plain - alone), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(plain, alone, atol=1e-2)
    for g in (0, 2):
        with pytest.raises(ValueError, match=rf"guidance={g} with empty=None"):
            sample_chunk(model, cond, None, z, None, steps=1, guidance=g)


def test_chunks_sampled_one_by_one_use_the_memory() -> None:
    model = small_dit()
    z, _, cond = inputs(model, 6)
    x, memory = sample_chunk(model, cut(cond, slice(0, 3)), None, z[:, :3], None, steps=2, guidance=1)
    rest = (model, cut(cond, slice(3, 6)), None, z[:, 3:])
    with_memory, _ = sample_chunk(*rest, memory, steps=2, guidance=1)
    without, _ = sample_chunk(*rest, None, steps=2, guidance=1)
    assert (with_memory - without).abs().max() > 1e-3
    assert x.isfinite().all()


def test_weights_that_are_missing_or_do_not_fit(tmp_path: Path) -> None:
    write_untrained(tmp_path)
    (tmp_path / "prior.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"prior\.safetensors not found"):
        Pipeline(tmp_path)
    (tmp_path / "reader.safetensors").replace(tmp_path / "prior.safetensors")
    with pytest.raises(ValueError, match=r"prior\.safetensors don't fit") as error:
        Pipeline(tmp_path)
    assert "\n" not in str(error.value)


def test_stored_weights_come_back(tmp_path: Path) -> None:
    layer, back = nn.Linear(3, 4), nn.Linear(3, 4)
    path = weights.store(layer, "layer", tmp_path, steps="12")
    weights.load({"layer": back}, tmp_path)
    for a, b in zip(layer.parameters(), back.parameters(), strict=True):
        assert torch.equal(a.half().float(), b)
        assert not b.requires_grad
    assert not back.training
    assert list(tmp_path.iterdir()) == [path], "nothing else is left"


def test_a_failed_store_keeps_the_older_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights.store(nn.Linear(3, 4), "layer", tmp_path)
    before = path.read_bytes()

    def dies(tensors: dict[str, Tensor], file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(weights, "save_file", dies)
    with pytest.raises(OSError, match="no space"):
        weights.store(nn.Linear(3, 4), "layer", tmp_path)
    assert path.read_bytes() == before


def test_prompts_reach_the_model(pipeline: Pipeline) -> None:
    wish = {"size": "tiny", "seconds": 0.5}
    films = [
        film(pipeline, Request(p, **wish)) for p in ("red kite looping ocean still", "blue kite looping ocean still")
    ]
    assert not torch.equal(*films)
    assert parse("red kite looping ocean still").ids().tolist() == [0, 5, 3, 3, 0]
