"""What the drawings show: styles, concepts, category words and the classes of the bundled task.

Everything a person decided by hand is in this file; `build_drawings.py` only applies it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

# Sets used for pre-training. fxemoji's names lack spaces: only those that match Unicode count.
TRAIN_STYLES = (
    "noto", "noto-v1", "twemoji", "openmoji", "emojione", "emojione-v1", "emojione-monotone",
    "fxemoji",
)  # fmt: skip

# Sets never seen in pre-training; the first is the source domain of the task.
TASK_STYLES = ("fluent-emoji-flat", "fluent-emoji", "fluent-emoji-high-contrast",
               "streamline-emojis")  # fmt: skip

# Unicode subgroups that say little in a picture, or that hundreds of drawings would drown in.
SKIPPED_SUBGROUPS = {"country-flag", "subdivision-flag", "skin-tone", "hair-style"}

# Mirroring one of these changes what it is.
NO_FLIP = {
    "arrow", "alphanum", "keycap", "av-symbol", "math", "punctuation", "currency", "time",
    "hand-single-finger", "zodiac", "book-paper", "other-symbol", "letters",
}  # fmt: skip

# Ordinary words for a subgroup; captions use them beside the concept's own name.
CATEGORY_WORDS: dict[str, tuple[str, ...]] = {
    "face-smiling": ("smiling face", "happy face", "face"),
    "face-affection": ("smiling face", "loving face", "face"),
    "face-tongue": ("face with tongue", "playful face", "face"),
    "face-hand": ("face with hand", "face"),
    "face-neutral-skeptical": ("neutral face", "face"),
    "face-sleepy": ("sleepy face", "tired face", "face"),
    "face-unwell": ("sick face", "face"),
    "face-hat": ("face with hat", "face"),
    "face-glasses": ("face with glasses", "face"),
    "face-concerned": ("sad face", "worried face", "face"),
    "face-negative": ("angry face", "face"),
    "face-costume": ("monster", "creature"),
    "cat-face": ("cat face", "cat"),
    "monkey-face": ("monkey", "animal"),
    "heart": ("heart", "love"),
    "emotion": ("comic symbol", "feeling"),
    "hand-fingers-open": ("hand", "gesture", "open hand"),
    "hand-fingers-partial": ("hand", "gesture", "fingers"),
    "hand-single-finger": ("hand", "gesture", "pointing finger"),
    "hand-fingers-closed": ("hand", "gesture", "fist"),
    "hands": ("hand", "two hands", "gesture"),
    "hand-prop": ("hand",),
    "body-parts": ("body part", "part of the body"),
    "person": ("person", "portrait"),
    "person-gesture": ("person", "person making a gesture"),
    "person-role": ("person at work", "worker", "person"),
    "person-fantasy": ("fantasy character", "fairy tale figure", "person"),
    "person-activity": ("person doing something", "activity", "person"),
    "person-sport": ("athlete", "person doing sport", "sport"),
    "person-resting": ("person resting", "person"),
    "family": ("family", "couple", "people"),
    "person-symbol": ("people symbol", "silhouette"),
    "animal-mammal": ("mammal", "animal", "land animal"),
    "animal-bird": ("bird", "animal"),
    "animal-amphibian": ("amphibian", "animal"),
    "animal-reptile": ("reptile", "animal"),
    "animal-marine": ("sea animal", "animal", "sea creature"),
    "animal-bug": ("bug", "insect", "animal"),
    "plant-flower": ("flower", "plant"),
    "plant-other": ("plant", "leaf", "tree"),
    "food-fruit": ("fruit", "food"),
    "food-vegetable": ("vegetable", "food"),
    "food-prepared": ("meal", "food", "dish"),
    "food-asian": ("asian food", "meal", "food"),
    "food-sweet": ("dessert", "sweet food", "food"),
    "drink": ("drink", "beverage"),
    "dishware": ("dishware", "cutlery"),
    "place-map": ("map", "globe"),
    "place-geographic": ("landscape", "scenery", "nature"),
    "place-building": ("building", "house"),
    "place-religious": ("religious building", "building", "temple"),
    "place-other": ("place", "scenery"),
    "transport-ground": ("vehicle", "land transport", "traffic"),
    "transport-water": ("boat", "ship", "water transport"),
    "transport-air": ("aircraft", "flying machine", "air transport"),
    "hotel": ("hotel", "travel"),
    "time": ("clock", "time", "clock face"),
    "sky-weather": ("weather", "sky"),
    "event": ("celebration", "festival", "party"),
    "award-medal": ("medal", "award"),
    "sport": ("sports equipment", "sport", "game"),
    "game": ("game", "toy"),
    "arts-crafts": ("art", "craft"),
    "clothing": ("clothing", "garment", "fashion"),
    "sound": ("sound", "loudspeaker"),
    "music": ("music", "sound"),
    "musical-instrument": ("musical instrument", "music"),
    "phone": ("telephone", "electronic device"),
    "computer": ("computer", "electronic device"),
    "light-video": ("camera", "light", "film"),
    "book-paper": ("book", "paper", "document"),
    "money": ("money", "finance"),
    "mail": ("mail", "letter"),
    "writing": ("writing tool", "pen"),
    "office": ("office supplies", "office"),
    "lock": ("lock", "key"),
    "tool": ("tool", "weapon", "hardware"),
    "science": ("science", "laboratory equipment"),
    "medical": ("medicine", "medical equipment"),
    "household": ("household item", "furniture"),
    "other-object": ("object",),
    "transport-sign": ("sign", "public sign"),
    "warning": ("warning sign", "sign", "prohibition sign"),
    "arrow": ("arrow", "direction"),
    "religion": ("religious symbol", "symbol"),
    "zodiac": ("zodiac sign", "star sign", "symbol"),
    "av-symbol": ("media button", "player button", "button"),
    "gender": ("gender symbol", "symbol"),
    "math": ("mathematical symbol", "symbol"),
    "punctuation": ("punctuation mark", "symbol"),
    "currency": ("currency symbol", "symbol"),
    "other-symbol": ("symbol",),
    "keycap": ("number", "number key", "button"),
    "alphanum": ("button with letters", "text", "button"),
    "geometric": ("geometric shape", "shape"),
    "flag": ("flag",),
    "letters": ("letter", "character"),
}

# Class name -> the subgroups it takes, or "subgroup: label; label" for a part of one, or
# "subgroup - label; label" for all but some. Chosen for what looks alike, before any model ran.
TASK_CLASSES: dict[str, tuple[str, ...]] = {
    "smiling face": ("face-smiling - upside-down face; melting face", "face-affection",
                     "face-tongue"),
    "sad face": ("face-concerned", "face-sleepy", "face-unwell - exploding head"),
    "hand": ("hand-fingers-open", "hand-fingers-partial", "hand-single-finger",
             "hand-fingers-closed", "hands", "hand-prop - selfie"),
    "heart": ("heart - love letter",),
    "person": ("person", "person-gesture"),
    "worker": ("person-role - ninja; person with crown; prince; princess",),
    "athlete": ("person-sport",),
    "fantasy character": ("person-fantasy",),
    "mammal": ("animal-mammal - paw prints; pig nose",),
    "bird": ("animal-bird - feather; wing",),
    "sea animal": ("animal-marine - coral; spiral shell; oyster",),
    "bug": ("animal-bug - spider web; microbe",),
    "plant": ("plant-flower - rosette",
              "plant-other - empty nest; nest with eggs; mushroom"),
    "fruit": ("food-fruit - coconut",),
    "vegetable": ("food-vegetable - peanuts; chestnut",),
    "meal": ("food-prepared - salt; butter; egg", "food-asian"),
    "dessert": ("food-sweet - honey pot",),
    "drink": ("drink - ice; pouring liquid",),
    "building": ("place-building - building construction; brick; rock; wood; Statue of Liberty",
                 "place-religious - kaaba"),
    "landscape": ("place-geographic", "place-other: foggy; night with stars; cityscape; sunrise "
                  "over mountains; sunrise; cityscape at dusk; sunset; bridge at night",
                  "sky-weather: rainbow; milky way; water wave"),
    "vehicle": ("transport-ground - station; bus stop; motorway; railway track; oil drum; fuel "
                "pump; wheel; police car light; horizontal traffic light; vertical traffic light; "
                "stop sign; construction; roller skate; skateboard; manual wheelchair; "
                "motorized wheelchair",),
    "clock": ("time - hourglass done; hourglass not done",),
    "weather": ("sky-weather: sun; cloud; sun behind cloud; cloud with lightning and rain; sun "
                "behind small cloud; sun behind large cloud; sun behind rain cloud; cloud with "
                "rain; cloud with snow; cloud with lightning; tornado; fog; wind face; umbrella "
                "with rain drops; high voltage; snowflake; snowman; snowman without snow; sun "
                "with face; droplet",),
    "sports equipment": ("sport - martial arts uniform; running shirt",),
    "clothing": ("clothing - glasses; sunglasses; goggles; folding hand fan; hair pick; crown; "
                 "prayer beads; lipstick; ring; gem stone",),
    "musical instrument": ("musical-instrument", "sound: postal horn; bell"),
    "book": ("book-paper - label; scroll",
             "office: spiral notepad; clipboard; card index; tear-off calendar; calendar; "
             "spiral calendar; chart increasing; chart decreasing; bar chart"),
    "tool": ("tool - link; broken chain; chains; bomb; magnet; balance scale; gear; hook",
             "writing - memo", "dishware: kitchen knife"),
    "arrow": ("arrow",),
    "media button": ("av-symbol - antenna bars; wireless; vibration mode; mobile phone off",),
    "text button": ("alphanum", "keycap"),
    "shape": ("geometric",),
    "sign": ("transport-sign", "warning"),
    "electronic device": ("phone - telephone receiver", "computer - abacus; optical disk; dvd",
                          "light-video: movie camera; television; camera; camera with flash; "
                          "video camera; videocassette; film projector",
                          "music: radio; studio microphone; microphone; headphone",
                          "game: video game; joystick"),
}  # fmt: skip


@dataclass
class Concept:
    """One thing that several designers drew: its name, keywords, subgroup and task class."""

    key: str
    name: str
    subgroup: str
    keywords: tuple[str, ...] = ()
    base: str = ""
    task_class: str | None = None


def slug(text: str) -> str:
    """Letters and digits only, so that "Woman's hat" meets "womans-hat"."""
    return re.sub(r"[^a-z0-9]", "", text.lower().replace("ñ", "n").replace("å", "a"))


def base_name(name: str) -> str:
    """The name without who does it: man, woman and person variants stay in one split."""
    name = re.sub(r"\b(wo)?(man|men)'?s?\b|\bperson\b|\bpeople\b|\bfacing right\b", " ", name)
    pairs = {"merman": "mer", "mermaid": "mer", "merperson": "mer", "prince": "royal",
             "princess": "royal", "mrs. claus": "claus", "mx claus": "claus",
             "santa claus": "claus", "clock": "clock"}  # fmt: skip
    name = pairs.get(name.lower().strip(), name.lower())
    name = name.split(":")[0] if name.startswith(("family", "kiss", "couple with heart")) else name
    return " ".join(re.findall(r"[a-z0-9]+", name)) or "person"


def _matches(rule: str, concept: Concept) -> bool:
    if " - " in rule:
        group, names = rule.split(" - ")
        return concept.subgroup == group and slug(concept.name) not in map(slug, names.split(";"))
    if ": " in rule:
        group, names = rule.split(": ")
        return concept.subgroup == group and slug(concept.name) in map(slug, names.split(";"))
    return concept.subgroup == rule


def load_concepts(emojibase: Path) -> dict[str, Concept]:
    """Unicode's emoji, by code points without the presentation selector."""
    groups = json.loads((emojibase / "meta/groups.json").read_text())["subgroups"]
    concepts = {}
    for emoji in json.loads((emojibase / "en/data.json").read_text()):
        if "subgroup" not in emoji:
            continue  # regional indicators: letters that make flags
        subgroup = groups[str(emoji["subgroup"])]
        if subgroup in SKIPPED_SUBGROUPS:
            continue
        name = emoji["label"].replace("’", "'").replace("“", "").replace("”", "")
        key = emoji["hexcode"].replace("-FE0F", "").lower()
        concept = Concept(key, name, subgroup, tuple(emoji.get("tags", ())), base_name(name))
        for class_name, rules in TASK_CLASSES.items():
            if any(_matches(rule, concept) for rule in rules):
                concept.task_class = class_name
        concepts[key] = concept
    return concepts
