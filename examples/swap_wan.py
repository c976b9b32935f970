"""Give a Wan transformer sparse attention over its own grid, by a pattern and by blocks chosen as it runs:
``python examples/swap_wan.py``"""

import torch
from diffusers import WanTransformer3DModel

import hhattn
from hhattn import masks


def pattern(layout: hhattn.VideoLayout) -> hhattn.BlockMask:
    """A window of 3x3x3 tiles, and the first frame; called once for each grid that the model is given."""
    return masks.sliding_tile(layout, (3, 3, 3), order="tile") | masks.sink(layout, 1, order="tile")


if __name__ == "__main__":
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=256,
        num_layers=2,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 48, 64),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }
    with torch.no_grad():
        before = model(**inputs).sample
        plan = masks.SparsityPlan(masks.Selector(masks.mean_pool(), masks.top_k(ratio=0.25)), dense_layers=1)
        for name, attention in {"exact": "exact", "pattern": pattern, "top 25 %, first layer dense": plan}.items():
            with hhattn.swap(model, attention=attention):
                after = model(**inputs).sample
            print(f"{name:30} relative difference {float((after - before).norm() / before.norm()):.1e}")
        print(f"bit for bit the same after undo: {torch.equal(model(**inputs).sample, before)}")
