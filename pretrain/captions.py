"""Captions and what they are true of.

A caption is a phrase in a template. A phrase is true of one concept (its name), or of many (a
keyword, a category word): training targets are the concepts a caption is true of, so that "bird"
comes to lie amid all birds.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

from concepts import CATEGORY_WORDS

SHORT = (
    "{}", "{}.", "a {}", "a {}.", "the {}", "a drawing of a {}.", "a picture of a {}.",
    "an emoji of a {}.", "a {} emoji.", "a photo of a {}.", "an image of a {}.",
    "an icon of a {}.", "clip art of a {}.", "a cartoon of a {}.", "a sticker of a {}.",
    "a small drawing of a {}.", "a {} symbol.", "drawing of {}", "this is a {}.",
)  # fmt: skip
LONG = (
    "a small and simple drawing made by a designer, on a white background, of a {}.",
    "a colourful picture that one may send in a message to a friend, and it shows a {}.",
    "here you see, in the middle of the image, drawn with a few clear lines, a {}.",
    "a black and white drawing with thick outlines and no colour at all of a {}.",
    "one of many little pictures on a telephone, in a flat style with bright colours: a {}.",
    "what the artist wanted to show in this drawing, as well as one can tell, is a {}.",
    "a flat illustration of a {}.", "a glossy three dimensional picture of a {}.",
    "a black and white icon of a {}.", "a hand drawn outline of a {} with bold lines.",
)  # fmt: skip
# Words that mean nothing here; put before a name they teach the tower to look past a context.
FILLER_TEXT = (
    "the very nice new old good big small some other this that with and of for from in on at one "
    "many simple plain clear bright dark flat round soft bold thin thick light picture image "
    "drawing icon emoji style colour line shape art design made drawn shown seen here there which "
    "is are was can may just only also x"
)
FILLERS = FILLER_TEXT.split()
# Shares of the kinds of caption: a category word alone, a keyword alone, a category word beside
# the name, keywords before the name; the rest is the name alone. Category words stand beside a
# name only ("a drawing of a bird, eagle."): on their own, true of all birds at once, they would be
# supervision for the classes of the bundled task, and its zero-shot would not be one.
CATEGORY_ALONE, KEYWORD_ALONE, CATEGORY_BESIDE, KEYWORDS_BESIDE = 0.0, 0.25, 0.15, 0.2
CONTEXT_TOKEN = "x"
CONTEXT_LENGTH = 16


@dataclass
class Caption:
    """Text and the concepts (by index) that it is true of."""

    text: str
    concepts: list[int]
    random_context: bool = False


@dataclass
class Phrases:
    """For each concept its phrases; for each phrase its concepts."""

    concepts: list[dict]
    by_keyword: dict[str, list[int]] = field(default_factory=dict)
    by_category: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keyword, category = defaultdict(list), defaultdict(list)
        for i, concept in enumerate(self.concepts):
            for word in set(concept["keywords"]) | {concept["name"].lower()}:
                keyword[word.lower()].append(i)
            for word in CATEGORY_WORDS.get(concept["subgroup"], ()):
                category[word].append(i)
        self.by_keyword, self.by_category = dict(keyword), dict(category)

    def draw(self, i: int, rng: random.Random) -> Caption:
        """A caption that is true of concept i."""
        concept = self.concepts[i]
        name = concept["name"]
        name = name if rng.random() < 0.5 else name.lower()
        keywords = concept["keywords"]
        categories = CATEGORY_WORDS.get(concept["subgroup"], ())
        kinds = ("category", "keyword", "category beside", "keywords beside", "name")
        shares = (CATEGORY_ALONE, KEYWORD_ALONE, CATEGORY_BESIDE, KEYWORDS_BESIDE)
        kind = rng.choices(kinds, (*shares, 1 - sum(shares)))[0]
        if categories and kind == "category":
            phrase = rng.choice(categories) if rng.random() < 0.6 else categories[0]
            true_of = self.by_category[phrase]
        elif keywords and kind == "keyword":
            phrase = rng.choice(keywords).lower()
            true_of = self.by_keyword[phrase]
        elif categories and kind == "category beside":
            pair = [name, rng.choice(categories)]
            rng.shuffle(pair)
            phrase, true_of = ", ".join(pair), [i]
        elif keywords and kind == "keywords beside":
            words = rng.sample(keywords, min(len(keywords), rng.randint(1, 5)))
            phrase, true_of = ", ".join([*words, name]), [i]
        else:
            phrase, true_of = name, self.by_keyword[name.lower()]
        return self._template(phrase, true_of, rng)

    def _template(self, phrase: str, true_of: list[int], rng: random.Random) -> Caption:
        kind = rng.random()
        if kind < 0.5:
            return Caption(rng.choice(SHORT).format(phrase), true_of)
        if kind < 0.65:
            return Caption(rng.choice(LONG).format(phrase), true_of)
        if kind < 0.8:
            words = " ".join(rng.choices(FILLERS, k=rng.randint(1, 20)))
            return Caption(f"{words} {phrase}.", true_of)
        # Sixteen placeholders that become random vectors: the place of a learned context
        context = " ".join([CONTEXT_TOKEN] * CONTEXT_LENGTH)
        return Caption(f"{context} {phrase}.", true_of, random_context=True)
