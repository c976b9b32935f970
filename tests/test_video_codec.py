"""The codec: causal, and the same in pieces as in one go."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from video_models import untrained_codec

from hhattn.video.codec import CHANNELS, SPACE, TIME, CausalMix, Codec, DecoderState, EncoderState
from hhattn.video.world import Clip, render

H, W = 64, 96


def film(frames: int, seed: int = 0) -> Tensor:
    return torch.rand(1, frames, 3, H, W, generator=torch.Generator().manual_seed(seed))


def latents(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(1, frames, CHANNELS, H // SPACE, W // SPACE, generator=torch.Generator().manual_seed(seed))


def encode_in_pieces(frames: Tensor, lens: list[int]) -> tuple[Tensor, EncoderState]:
    out, state = [], None
    for piece in frames.split(lens, 1):
        z, state = untrained_codec().encode(piece, state)
        out.append(z)
    assert state is not None
    return torch.cat(out, 1), state


def decode_in_pieces(z: Tensor, lens: list[int]) -> tuple[Tensor, DecoderState]:
    out, state = [], None
    for piece in z.split(lens, 1):
        frames, state = untrained_codec().decode(piece, state)
        out.append(frames)
    assert state is not None
    return torch.cat(out, 1), state


@pytest.mark.parametrize("n", [0, 1, 4])
def test_one_and_four_n_frames_are_one_and_n_latents(n: int) -> None:
    z, _ = untrained_codec().encode(film(1 + TIME * n))
    assert z.shape == (1, 1 + n, CHANNELS, H // SPACE, W // SPACE)
    frames, _ = untrained_codec().decode(z)
    assert frames.shape == (1, 1 + TIME * n, 3, H, W)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=8))
def test_encoding_in_any_pieces_is_encoding_at_once(lens: list[int]) -> None:
    """Bit for bit: a block's latent depends on nothing but the block."""
    frames = film(sum(lens))
    z, state = encode_in_pieces(frames, lens)
    whole, _ = untrained_codec().encode(frames)
    assert torch.equal(z, whole)
    assert z.shape[1] == (0 if not sum(lens) else 1 + (sum(lens) - 1) // TIME)
    waiting = 0 if not sum(lens) else (sum(lens) - 1) % TIME
    assert state.pending is not None
    assert state.pending.shape[1] == waiting
    assert state.pending.untyped_storage().nbytes() == state.pending.numel() * 4, "the state keeps more than it says"


@pytest.mark.parametrize("lens", [[1] * 6, [2, 1, 3], [5, 1], [1, 5]])
def test_decoding_chunk_by_chunk_is_decoding_at_once(lens: list[int]) -> None:
    z = latents(6)
    whole, _ = untrained_codec().decode(z)
    pieces, _ = decode_in_pieces(z, lens)
    # a convolution over another number of pictures sums in another order
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)


def test_the_temporal_mixing_carries_across_chunks() -> None:
    """Forgetting the state shows, so the test above can fail."""
    z = latents(4)
    _, state = untrained_codec().decode(z[:, :2])
    remembered, _ = untrained_codec().decode(z[:, 2:], state)
    forgotten = untrained_codec().reconstruct(z[:, 2:])[0]
    assert (remembered - forgotten).abs().max() > 1e-3


def test_decoding_looks_back_and_never_ahead() -> None:
    z = latents(5)
    other = z.clone()
    other[:, 3] += 1
    a, b = (untrained_codec().decode(x)[0] for x in (z, other))
    last_before = 1 + TIME * 2
    torch.testing.assert_close(a[:, :last_before], b[:, :last_before], rtol=0, atol=1e-5)
    changed = (a - b).abs().amax((0, 2, 3, 4))[last_before:]
    assert (changed > 1e-3).all(), "the frames of that latent and of the next see it"


def test_state_size_is_constant() -> None:
    def size(past: Tensor) -> tuple[int, int]:
        return past.numel(), past.untyped_storage().nbytes()

    sizes = {size(decode_in_pieces(latents(n), lens)[1].past) for n, lens in ((1, [1]), (9, [5, 4]), (12, [1] * 12))}
    assert len(sizes) == 1
    ((numel, held),) = sizes
    assert held == numel * 4, "the state keeps more alive than it says"


@pytest.mark.parametrize("frames", [2, 5])
def test_skipping_pictures_leaves_the_state_of_decoding_them(frames: int) -> None:
    z = latents(frames)
    assert torch.allclose(untrained_codec().skip(z).past, untrained_codec().decode(z)[1].past, atol=1e-5)


def test_causal_mix_is_the_convolution_it_says() -> None:
    """y_t = x_t + W·[x_{t-2}, x_{t-1}, x_t] + b, the first frame standing in for what came before it."""
    mix = CausalMix(3)
    torch.nn.init.normal_(mix.mix.weight)
    torch.nn.init.normal_(mix.mix.bias)
    x = torch.randn(1, 4, 3, 1, 1)
    y, past = mix(x, None)
    padded = torch.cat([x[:, :1], x[:, :1], x], 1)[0, :, :, 0, 0]
    for t in range(4):
        expected = x[0, t, :, 0, 0] + mix.mix.weight[:, :, 0, 0] @ padded[t : t + 3].flatten() + mix.mix.bias
        torch.testing.assert_close(y[0, t, :, 0, 0], expected)
    assert torch.equal(past, x[:, -2:])


def test_the_encoder_is_linear_and_local() -> None:
    a, b = film(5, 1), film(5, 2)
    za, zb, mixed = (untrained_codec().encode(x)[0] for x in (a, b, 0.3 * a + 0.7 * b))
    torch.testing.assert_close(mixed, 0.3 * za + 0.7 * zb, rtol=1e-4, atol=1e-4)
    touched = a.clone()
    touched[:, 2, :, 40, 70] = 0  # second latent, cell (1, 2)
    change = (untrained_codec().encode(touched)[0] - za).abs().amax((0, 2))
    assert change[1, 1, 2] > 1e-3
    change[1, 1, 2] = 0
    assert not change.any()


def test_blocks_at_quarter_size_are_those_of_full_size() -> None:
    frames = film(4)
    small = torch.nn.functional.avg_pool2d(frames.flatten(0, 1), 4).unflatten(0, (1, 4))
    assert torch.equal(Codec.blocks(frames), Codec.blocks(small, 1))


def test_fit_finds_the_components() -> None:
    """Blocks of rank 3 come back whole from 4 channels, strongest component first, and latents have unit variance
    on average."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(768, 3, generator=g))[0]
    blocks = 0.5 + torch.randn(2000, 3, generator=g) * torch.tensor([4.0, 2.0, 1.0]) @ basis.T
    blocks = blocks + 1e-3 * torch.randn(2000, 768, generator=g)
    codec = Codec(4)
    codec.fit(blocks)
    z = codec.project(blocks.view(1, 1, 40, 50, 768))
    back = (z.movedim(2, -1) * codec.spread) @ codec.basis.T + codec.mean
    torch.testing.assert_close(back.view(-1, 768), blocks, rtol=0, atol=1e-2)
    assert z.var((0, 1, 3, 4)).mean() == pytest.approx(1, rel=1e-2)
    deviation = (z[0, 0].flatten(1).std(1) * codec.spread)[:3]
    torch.testing.assert_close(deviation, torch.tensor([4.0, 2.0, 1.0]), rtol=0.1, atol=0)
    assert ((codec.basis[:, :3].T @ basis).abs().diagonal() > 0.99).all()


def test_the_linear_part_alone_shows_the_picture() -> None:
    clip = Clip.draw(random.Random(3))
    frames = render(clip, torch.arange(5) / 16, 176, 320)[0][None, :, :, :160]
    z, _ = untrained_codec().encode(frames)
    coarse = untrained_codec().decode_linear(z)[:, TIME - 1 :]
    seen = torch.nn.functional.avg_pool2d(frames.flatten(0, 1), 4)
    assert (coarse[0] - seen).square().mean().sqrt() < 0.3 * seen.std()


def test_batch_items_do_not_mix() -> None:
    a, b = film(5, 1), film(5, 2)
    both, _ = untrained_codec().encode(torch.cat([a, b]))
    torch.testing.assert_close(
        both, torch.cat([untrained_codec().encode(a)[0], untrained_codec().encode(b)[0]]), rtol=1e-5, atol=1e-5
    )
    frames, _ = untrained_codec().decode(both)
    torch.testing.assert_close(frames[1:], untrained_codec().decode(both[1:])[0], rtol=0, atol=1e-5)
