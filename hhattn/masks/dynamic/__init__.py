"""Masks chosen from q and k as the model runs: scorer × policy, and the plan of when to choose anew."""

from hhattn.masks.dynamic.antidiagonal import antidiagonal
from hhattn.masks.dynamic.centroid import Clusters, centroid
from hhattn.masks.dynamic.plan import LayerPlan, Selector, SparsityPlan
from hhattn.masks.dynamic.policies import Policy, threshold, top_k, top_p
from hhattn.masks.dynamic.pooling import coarse_attention, mean_pool, self_similarity
from hhattn.masks.dynamic.recall import Quality, quality, recall
from hhattn.masks.dynamic.select import Scorer, select

__all__ = [
    "Clusters",
    "LayerPlan",
    "Policy",
    "Quality",
    "Scorer",
    "Selector",
    "SparsityPlan",
    "antidiagonal",
    "centroid",
    "coarse_attention",
    "mean_pool",
    "quality",
    "recall",
    "select",
    "self_similarity",
    "threshold",
    "top_k",
    "top_p",
]
