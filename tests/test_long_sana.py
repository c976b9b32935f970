"""Long clips from SANA-Video's pipelines: diffusers' own result where one chunk is the clip, no growth beyond it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import sana_pipeline
from model_zoo import relative
from sana_pipeline import HEIGHT, WIDTH

import hhattn
from hhattn.integrations.diffusers.long_sana import LongRequest, LongSana

LEVELS = (1000.0, 727.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sana_pipeline.save(tmp_path_factory.mktemp("sana"))


@pytest.fixture
def sana(folder: Path) -> LongSana:
    return LongSana.from_pretrained(folder)


def request(**settings: Any) -> LongRequest:
    usual = {"prompt": "a red balloon", "frames": 41, "height": HEIGHT, "width": WIDTH, "chunk": 4, "steps": LEVELS}
    return LongRequest(**{**usual, **settings})


def joined(sana: LongSana, wanted: LongRequest) -> tuple[Tensor, Tensor]:
    chunks = list(sana.stream(wanted))
    return torch.cat([c.frames for c in chunks]), torch.cat([c.latents for c in chunks], dim=2)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_one_chunk_is_diffusers_own_clip(folder: Path, guidance: float) -> None:
    sana = LongSana.from_pretrained(folder)
    wanted = request(frames=13, chunk=4, steps=3, guidance=guidance, negative_prompt="blue")
    frames, latents = joined(sana, wanted)
    noise, _ = sana.noise(wanted, 0, 4)
    sana.close()
    settings = {
        "prompt": wanted.prompt, "negative_prompt": "blue", "frames": 13, "height": HEIGHT, "width": WIDTH,
        "num_inference_steps": 3, "guidance_scale": guidance, "latents": noise, "use_resolution_binning": False,
    }  # fmt: skip
    expected = sana.pipeline(**settings, output_type="latent").frames
    assert relative(latents, expected) < 1e-4
    pictures = torch.from_numpy(sana.pipeline(**settings, output_type="np").frames[0])
    assert frames.shape == (13, HEIGHT, WIDTH, 3)
    assert (frames.float() / 255 - pictures).abs().max() < 1 / 255


def test_the_memory_is_the_sum_over_every_token(sana: LongSana) -> None:
    """Against the reference's formula in float64, from the very inputs of the passes that write."""
    seen: list[Tensor] = []
    attention = sana.pipeline.transformer.transformer_blocks[1].attn1

    def record(_: Any, args: tuple[Tensor, ...]) -> None:
        if sana._stream._writing:
            seen.append(args[0])

    attention.register_forward_pre_hook(record)
    _, latents = joined(sana, request())
    assert len(seen) == 3
    assert latents.shape[2] == 11
    x = torch.cat(seen, dim=1).double()
    double = {name: p.double() for name, p in attention.named_parameters()}

    def projected(name: str) -> Tensor:
        return x @ double[f"to_{name}.weight"].T + (double.get(f"to_{name}.bias", torch.zeros(1)).double())

    def normed(y: Tensor, name: str, eps: float) -> Tensor:
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * double[f"norm_{name}.weight"]

    k = normed(projected("k"), "k", attention.norm_k.eps).unflatten(2, (2, 12)).relu()
    v = projected("v").unflatten(2, (2, 12))
    cos, sin = (table.double()[None, :, None] for table in hhattn.rope_3d((11, 2, 4), 12))
    turned = k * cos + torch.stack([-k[..., 1::2], k[..., ::2]], -1).flatten(-2) * sin
    sums = sana._stream.memory[1].sums
    assert sums is not None
    assert relative(sums.kv.double(), torch.einsum("bshd,bshe->bhde", turned, v)) < 1e-5
    assert relative(sums.k_sum.double(), k.sum(1)) < 1e-5


def test_stopped_and_gone_on_with_is_the_same_to_the_bit(folder: Path, tmp_path: Path) -> None:
    wanted = request(prompt={0: "a red balloon", 2: "a blue boat"}, frames=53)
    first, second = LongSana.from_pretrained(folder), LongSana.from_pretrained(folder)
    frames, latents = joined(first, wanted)
    half = first.stream(wanted)
    got = [next(half), next(half)]
    torch.save(first.state(), tmp_path / "state.pt")
    got += list(second.stream(wanted, torch.load(tmp_path / "state.pt", weights_only=False)))
    assert [chunk.index for chunk in got] == [0, 1, 2, 3]
    assert torch.equal(torch.cat([chunk.frames for chunk in got]), frames)
    assert torch.equal(torch.cat([chunk.latents for chunk in got], dim=2), latents)


def test_a_state_in_memory_is_not_changed_by_going_on(sana: LongSana) -> None:
    chunks = sana.stream(request())
    next(chunks)
    state = sana.state()
    rest, again = list(chunks), list(sana.stream(request(), state))
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(rest, again, strict=True))


def test_streams_in_turn_are_streams_alone(sana: LongSana) -> None:
    """Each remembers its own clip; the state is that of the one whose chunk came last."""
    image = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = [request(), request(prompt="a blue boat", seed=3, chunk=2, frames=45), request(image=image, guidance=2.0)]
    sana._stream.limit = 7  # positions are counted anew on the way
    expected = [list(sana.stream(w)) for w in wanted]
    open_ones = [sana.stream(w) for w in wanted]
    got: list[list[Any]] = [[], [], []]
    order, states = [0, 1, 1, 2, 0, 1, 2, 2, 1, 0, 1, 1], {}
    for i in order:
        got[i].append(next(open_ones[i]))
        states[i] = sana.state()
    for i, clip in enumerate(expected):
        rest = list(sana.stream(wanted[i], states[i]))
        assert len(got[i]) + len(rest) == len(clip)
        for chunk, alone in zip(got[i] + rest, clip, strict=True):
            assert chunk.index == alone.index
            assert torch.equal(chunk.latents, alone.latents)
            assert torch.equal(chunk.frames, alone.frames)


def test_a_decoder_that_looks_both_ways_loses_no_picture(sana: LongSana) -> None:
    sana.pipeline.vae.enable_tiling()
    frames, _ = joined(sana, request())
    assert len(frames) == 41


def test_prompts_switch(sana: LongSana) -> None:
    _, one = joined(sana, request())
    _, two = joined(sana, request(prompt={0: "a red balloon", 1: "a blue boat"}))
    assert torch.equal(one[:, :, :4], two[:, :, :4])
    assert relative(one[:, :, 4:], two[:, :, 4:]) > 1e-3


def test_the_past_matters_and_pictures_go_on_over_chunks(sana: LongSana) -> None:
    """The decoder carries on: pictures are those of all latents decoded at once."""
    frames, latents = joined(sana, request())
    mean, spread = sana._scale(torch.float32)
    with torch.no_grad():
        whole = sana.pipeline.vae.decode(latents * spread + mean, return_dict=False)[0]
    expected = ((whole[0] / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 3, 0)
    assert (frames.float() - expected).abs().max() <= 0.51
    sana._stream.restore({"memory": [(None, None)] * 2, "position": 0})
    sana._at.index = 1
    with torch.no_grad():
        alone = sana._denoise(request(), sana._words("a red balloon", request()), 4)
    assert relative(alone, latents[:, :, 4:8]) > 1e-3


def test_a_picture_is_the_first(sana: LongSana) -> None:
    image = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    _, latents = joined(sana, request(image=image))
    with torch.no_grad():
        assert torch.equal(latents[:, :, :1], sana._encode(image))
    _, without = joined(sana, request())
    assert relative(latents[:, :, 1:], without[:, :, 1:]) > 1e-3


def test_positions_are_counted_anew_past_the_table(sana: LongSana) -> None:
    """A table of 10 latent frames and a clip of 24: the same as with a table that is long enough."""
    wanted = request(frames=93, steps=(1000.0,))
    assert sana._stream.limit == 64, "as the model says"
    _, expected = joined(sana, wanted)
    assert sana._stream.position == 24
    sana._stream.limit = 10
    _, latents = joined(sana, wanted)
    assert sana._stream.position == 8
    assert relative(latents, expected) < 1e-4


@pytest.mark.slow
def test_two_thousand_latent_frames(sana: LongSana) -> None:
    """Far past the model's table of 64, at the memory of the first chunk."""
    chunks, sizes = 0, set()
    for chunk in sana.stream(request(frames=7_997, chunk=20, steps=(1000.0,))):
        chunks += 1
        sizes.add(sana.nbytes)
        assert chunk.latents.isfinite().all()
    assert chunks == 100
    assert len(sizes) == 1


def test_what_is_remembered_does_not_grow(sana: LongSana) -> None:
    sizes = []
    for chunk in sana.stream(request(frames=121)):
        sizes.append(sana.nbytes)
        kept = [x for m in sana._stream.memory for x in (*(m.sums or ()), m.frame, chunk.latents)]
        assert not any(x.requires_grad for x in kept), "a graph would hold every chunk"
    assert len(sizes) == 8
    assert len(set(sizes)) == 1


def test_example_runs(folder: Path, tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples/long_sana.py"
    sizes = ("--frames", "41", "--height", str(HEIGHT), "--width", str(WIDTH))
    command = [sys.executable, str(example), str(folder), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"41 frames of ({HEIGHT}, {WIDTH}, 3)" in done.stdout
    assert not list(tmp_path.iterdir())


def test_close_gives_the_model_back(folder: Path) -> None:
    sana = LongSana.from_pretrained(folder)
    model = sana.pipeline.transformer
    x, text = torch.randn(1, 16, 3, 4, 8), torch.randn(1, 5, 16)
    sana.close()
    with torch.no_grad():
        before = model(x, text, torch.tensor([500.0]), return_dict=False)[0]
        other = LongSana(sana.pipeline)
        list(other.stream(request(frames=5)))
        other.close()
        assert torch.equal(model(x, text, torch.tensor([500.0]), return_dict=False)[0], before)
        held = LongSana(sana.pipeline)
        with pytest.raises(ValueError, match="streams already; close"):
            LongSana(sana.pipeline)
        del held  # forgotten: given back
        with LongSana(sana.pipeline) as another:
            next(another.stream(request()))
            # between chunks the model is its own
            assert torch.equal(model(x, text, torch.tensor([500.0]), return_dict=False)[0], before)
        assert type(model.transformer_blocks[0].attn1.processor).__module__.startswith("diffusers")


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_after_a_failed_chunk_it_goes_on_from_the_one_before(
    sana: LongSana, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the chunk had done already: positions counted anew, sums and frames written, pictures decoded."""
    sana._stream.limit = 7
    expected = list(sana.stream(request()))
    chunks = sana.stream(request())
    got = [next(chunks)]
    failing = sana._decode_on if part == "vae" else sana._predict
    calls = iter(range(100))

    def fail(*args: Any) -> Any:
        out = failing(*args)
        if part == "vae" or next(calls) == len(LEVELS):  # the pass that writes
            raise MemoryError
        return out

    with monkeypatch.context() as patch:
        patch.setattr(sana, failing.__name__, fail)
        with pytest.raises(MemoryError):
            next(chunks)
    got += list(sana.stream(request(), sana.state()))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.frames, other.frames)
        assert torch.equal(one.latents, other.latents)


def test_a_state_is_of_its_own_clip(sana: LongSana) -> None:
    next(sana.stream(request()))
    state = sana.state()
    for name, value in {"chunk": 3, "seed": 1, "steps": 2, "guidance": 2.0, "height": 48, "width": 32}.items():
        with pytest.raises(ValueError, match=f"^{name}=.*: state is of a clip with {name}="):
            sana.stream(request(**{name: value}), state)
    longer = list(sana.stream(request(prompt="a blue boat", frames=57), state))
    assert [chunk.index for chunk in longer] == [1, 2, 3]


def test_offloaded_it_comes_back_for_every_part(sana: LongSana, folder: Path) -> None:
    """accelerate's hooks see the VAE too, which is decoded frame by frame."""
    pytest.importorskip("accelerate")
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    hook = Count()
    add_hook_to_module(sana.pipeline.vae, hook)
    frames, _ = joined(sana, request(frames=25))
    assert hook.calls == 2  # chunks
    assert torch.equal(frames, joined(LongSana.from_pretrained(folder), request(frames=25))[0])


def test_refuses(sana: LongSana) -> None:
    for settings, message in (
        ({"prompt": {1: "a boat"}}, "with chunk 0 among them"),
        ({"frames": 0}, "frames=0: accepted is a whole number of 1 or more"),
        ({"frames": 9.5}, "frames=9.5: accepted is a whole number"),
        ({"steps": (100.0, 200.0)}, "accepted are levels above 0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": True}, "steps=True: accepted are levels"),
        ({"prompt": ["a", "b"]}, "accepted are words"),
        ({"prompt": None}, "accepted are words"),
        ({"seed": -1}, "seed=-1"),
        (
            {"image": torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8)},
            "image is torch.uint8, 0 to 0; accepted are floats",
        ),
        ({"image": torch.full((3, HEIGHT, WIDTH), 2.0)}, "image is torch.float32, 2 to 2; accepted are floats"),
        ({"guidance": 0.5}, "guidance=0.5"),
        ({"image": torch.zeros(3, 8, 8)}, r"image has shape \(3, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            request(**settings)
    with pytest.raises(ValueError, match="height=40: accepted are multiples of 16"):
        sana.stream(request(height=40))
    with pytest.raises(ValueError, match="without a transformer; accepted: SANA-Video's"):
        LongSana(torch.nn.Linear(1, 1))
