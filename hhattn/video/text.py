"""The prompt's language: a closed vocabulary of words for five slots (colour, subject, motion, scene, camera).

Words may come in any order and may be left out; what the prompt leaves open is chosen by the seed and reported. A
word that is not known is an error that names the nearest known ones: nothing is dropped in silence.
"""

from __future__ import annotations

import difflib
import random
import re
from dataclasses import dataclass

from torch import Tensor, tensor

SLOTS: dict[str, tuple[str, ...]] = {
    "color": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white"),
    "subject": ("ball", "balloon", "rocket", "butterfly", "ufo", "kite"),
    "motion": ("floating", "gliding", "circling", "looping", "swaying"),
    "scene": ("meadow", "sunset", "night", "ocean", "city", "space"),
    "camera": ("still", "panning"),
}

_SYNONYMS = {
    "violet": "purple", "rose": "pink",
    "sphere": "ball", "spaceship": "rocket", "saucer": "ufo",
    "bobbing": "floating", "hovering": "floating", "floats": "floating",
    "drifting": "gliding", "flying": "gliding", "glides": "gliding", "flies": "gliding",
    "circles": "circling", "orbiting": "circling",
    "loops": "looping", "eight": "looping",
    "sways": "swaying", "swinging": "swaying",
    "meadows": "meadow", "fields": "meadow", "dusk": "sunset", "evening": "sunset", "nighttime": "night",
    "sea": "ocean", "waves": "ocean", "skyline": "city", "town": "city", "stars": "space", "nebula": "space",
    "static": "still", "fixed": "still", "pan": "panning", "pans": "panning",
}  # fmt: skip

# words that say nothing a clip could show
FILLERS = frozenset(
    ["a", "an", "the", "of", "in", "on", "at", "over", "above", "across", "through", "under", "with", "and",
     "by", "to", "its", "is", "are", "camera", "video", "clip"]
)  # fmt: skip
# words that do say something, but nothing this model can do: they are allowed, and reported
UNUSED = frozenset(
    ["hot", "air", "slow", "slowly", "slight", "gentle", "gently", "hills", "hill", "calm", "outer", "figure",
     "day", "sky"]
)  # fmt: skip

_MEANING = {word: (slot, word) for slot, words in SLOTS.items() for word in words}
_MEANING |= {new: _MEANING[old] for new, old in _SYNONYMS.items()}


class PromptError(ValueError):
    """The prompt can't be understood; the message says which word, and what would be."""


def synonyms(word: str) -> list[str]:
    """Words that a prompt may use instead of ``word``."""
    return [new for new, old in _SYNONYMS.items() if old == word]


@dataclass(frozen=True)
class Prompt:
    """One word a slot, which of them the prompt left open (chosen by the seed), and which words had no effect."""

    words: dict[str, str]
    chosen: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def ids(self) -> Tensor:
        """The model's input ``[5]``: each slot's word as its index."""
        return tensor([SLOTS[slot].index(word) for slot, word in self.words.items()])

    def __str__(self) -> str:
        return " ".join(self.words.values())


def parse(text: str, seed: int = 0, defaults: dict[str, str] | None = None) -> Prompt:
    """Words -> one value for each slot. Slots that the text leaves open take ``defaults``, else a choice made by
    ``seed``.

    Raises PromptError for an unknown word, two values for one slot, or no word of the vocabulary at all.
    """
    if strange := re.findall(r"[^\w\s.,;:!?'\"()/-]", text):
        raise PromptError(f"the prompt has symbols that aren't words: {' '.join(strange)}; leave them out")
    found: dict[str, str] = {}
    unused: list[str] = []
    for word in re.findall(r"[^\W_]+", text.lower()):
        if word in FILLERS:
            continue
        if word in UNUSED:
            unused.append(word)
            continue
        if word not in _MEANING:
            near = difflib.get_close_matches(word, _MEANING, n=3, cutoff=0.5) or sorted(SLOTS["subject"])
            raise PromptError(
                f"unknown word {word!r} in the prompt; nearest known: {', '.join(near)} (`hhattn words` lists all)"
            )
        slot, value = _MEANING[word]
        if found.setdefault(slot, value) != value:
            raise PromptError(f"the prompt names two values for {slot}: {found[slot]!r} and {value!r}; name one")
    if not found:
        raise PromptError(
            f"the prompt {text!r} names nothing this model knows; subjects: {', '.join(SLOTS['subject'])}"
        )
    rng, words, chosen = random.Random(f"words {seed}"), {}, []
    for slot, options in SLOTS.items():
        pick = rng.choice(options)
        if slot not in found and not (defaults and slot in defaults):
            chosen.append(slot)
        words[slot] = found.get(slot) or (defaults or {}).get(slot) or pick
    return Prompt(words, tuple(chosen), tuple(dict.fromkeys(unused)))
