"""The prompt's language: what is said is what is used, and nothing is dropped in silence."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hhattn.video import text
from hhattn.video.text import FILLERS, SLOTS, UNUSED, Prompt, PromptError, parse

WORDS = {"color": "blue", "subject": "rocket", "motion": "looping", "scene": "space", "camera": "panning"}


@given(
    st.fixed_dictionaries({slot: st.sampled_from(options) for slot, options in SLOTS.items()}),
    st.randoms(use_true_random=False),
    st.lists(st.sampled_from(sorted(FILLERS)), max_size=6),
)
def test_any_order_and_any_filler(words: dict[str, str], rng: random.Random, fillers: list[str]) -> None:
    said = [*words.values(), *fillers]
    rng.shuffle(said)
    prompt = parse(", ".join(said).upper())
    assert prompt.words == words
    assert list(prompt.words) == list(SLOTS), "slots come in the model's order"
    assert prompt.chosen == ()
    assert prompt.ids().tolist() == [SLOTS[slot].index(words[slot]) for slot in SLOTS]
    assert parse(str(prompt)) == prompt


@pytest.mark.parametrize(("said", "slot", "meant"), [
    ("violet", "color", "purple"),
    ("spaceship", "subject", "rocket"),
    ("saucer", "subject", "ufo"),
    ("drifting", "motion", "gliding"),
    ("dusk", "scene", "sunset"),
    ("sea", "scene", "ocean"),
    ("static", "camera", "still"),
])  # fmt: skip
def test_synonyms(said: str, slot: str, meant: str) -> None:
    assert parse(said).words[slot] == meant
    assert slot not in parse(said).chosen
    assert parse(f"{said} {meant}").words[slot] == meant, "a word and its synonym don't contradict"


def test_every_synonym_means_a_word() -> None:
    for new, old in text._SYNONYMS.items():
        assert parse(new).words == parse(old).words
        assert new not in FILLERS
    assert not FILLERS & {w for options in SLOTS.values() for w in options}


def test_words_without_effect_are_reported() -> None:
    prompt = parse("a slow red ball in the sky by day, slow")
    assert prompt.unused == ("slow", "sky", "day")
    assert prompt.words["subject"] == "ball"
    assert parse("a red ball").unused == ()
    assert not UNUSED & (FILLERS | {w for options in SLOTS.values() for w in options})


@pytest.mark.parametrize("symbol", ["🎈", "♥", "$", "<b>"])
def test_symbols_are_refused(symbol: str) -> None:
    with pytest.raises(PromptError, match="symbols"):
        parse(f"a red {symbol} ball")


@pytest.mark.parametrize(
    ("said", "nearest"), [("ballon", "balloon"), ("skylines", "skyline"), ("butterflies", "butterfly")]
)
def test_an_unknown_word_names_the_nearest(said: str, nearest: str) -> None:
    with pytest.raises(PromptError) as error:
        parse(f"a red {said}")
    message = str(error.value)
    assert repr(said) in message
    assert nearest in message.split("nearest known:")[1]
    assert "\n" not in message


def test_an_unknown_word_like_no_other_still_gets_an_offer() -> None:
    with pytest.raises(PromptError, match=r"unknown word 'xqzv'.*balloon"):
        parse("red xqzv")


@pytest.mark.parametrize("word", ["42", "красный", "été", "日本"])
def test_other_scripts_and_numbers_are_not_dropped(word: str) -> None:
    with pytest.raises(PromptError, match=f"unknown word '{word}'"):
        parse(f"a red balloon {word}")


@pytest.mark.parametrize("slot", SLOTS)
def test_two_values_for_one_slot(slot: str) -> None:
    first, second = SLOTS[slot][:2]
    with pytest.raises(PromptError, match=f"two values for {slot}: '{first}' and '{second}'"):
        parse(f"{first} {second}")
    assert parse(f"{first} and {first}").words[slot] == first, "saying a word twice is no contradiction"


@pytest.mark.parametrize("prompt", ["", "  ", "a the of", "!?"])
def test_nothing_said(prompt: str) -> None:
    with pytest.raises(PromptError, match="names nothing"):
        parse(prompt)


def test_open_slots_are_chosen_by_the_seed_and_reported() -> None:
    prompts = [parse("red kite", seed) for seed in range(40)]
    assert all(p.chosen == ("motion", "scene", "camera") for p in prompts)
    assert all(p.words["color"] == "red" and p.words["subject"] == "kite" for p in prompts)
    for slot in prompts[0].chosen:
        assert {p.words[slot] for p in prompts} == set(SLOTS[slot]), "some word is never chosen"
    assert parse("red kite", 3) == parse("red kite", 3)


def test_saying_more_leaves_the_other_choices_alone() -> None:
    """What the seed chooses for one slot doesn't depend on which others were said."""
    for seed in range(20):
        short, long = parse("kite", seed), parse("kite looping", seed)
        assert short.words["scene"] == long.words["scene"]
        assert short.words["color"] == long.words["color"]


def test_defaults_fill_what_is_open_and_give_way_to_words() -> None:
    prompt = parse("green", 0, {"subject": "ufo", "color": "red", "scene": "city"})
    assert prompt.words["color"] == "green"
    assert (prompt.words["subject"], prompt.words["scene"]) == ("ufo", "city")
    assert prompt.chosen == ("motion", "camera")


def test_prompt_reads_as_words() -> None:
    assert str(Prompt(WORDS)) == "blue rocket looping space panning"
