"""Swap a SANA-Video transformer's attention for hhattn's, see that the numbers stay, and swap it back."""

import torch
from diffusers import SanaVideoTransformer3DModel

import hhattn

if __name__ == "__main__":
    torch.manual_seed(0)
    model = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        patch_size=(1, 2, 2),
        sample_size=8,
    ).eval()
    latents, text, step = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 5, 16), torch.tensor([500])
    with torch.no_grad():
        before = model(latents, text, step).sample
        with hhattn.swap(model) as swapped:
            after = model(latents, text, step).sample
            print(swapped.report())
        again = model(latents, text, step).sample
    print(f"relative difference while swapped: {float((after - before).norm() / before.norm()):.1e}")
    print(f"bit for bit the same after undo: {torch.equal(before, again)}")
