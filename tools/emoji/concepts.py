"""Define the concepts of the embedded data set: one emoji each, with names in two languages and a category.

The tables decide which article a name takes, and which concepts are too similar for one question.
"""

import re
from dataclasses import dataclass
from functools import cached_property

LANGUAGES = ("en", "zh")
CATEGORIES = {  # emojibase group number -> name; groups 2 (components) and 9 (flags) are not used
    0: ("faces and emotion", "表情与情感"),
    1: ("people and body", "人物与身体"),
    3: ("animals and nature", "动物与自然"),
    4: ("food and drink", "食物与饮料"),
    5: ("travel and places", "旅行与地点"),
    6: ("activities", "活动"),
    7: ("objects", "物品"),
    8: ("symbols", "符号"),
}

# Proper names take no article. The other names take no indefinite article: substances, games, signs and states.
PROPER_NAMES = frozenset(
    """aries taurus gemini cancer leo virgo libra scorpio sagittarius capricorn aquarius pisces ophiuchus""".split()
    + ["mount fuji", "santa claus", "mrs. claus", "tokyo tower", "zzz"]
)
BARE_NAMES = PROPER_NAMES | frozenset(
    re.split(
        r";\s+",
        """camping; foggy; night with stars; fog; high voltage; building construction; wood; bread; baguette bread;
        flatbread; stuffed flatbread; garlic; ginger root; bacon; popcorn; butter; salt; canned food; cooked rice;
        curry rice; spaghetti; oden; sushi; shaved ice; soft ice cream; ice cream; custard; sake; bubble tea; mate;
        ice; money with wings; coral; broccoli; fire; luggage; performing arts; tennis; bowling; field hockey;
        ice hockey; lacrosse; ping pong; badminton; american football; rugby football; horse racing; nail polish;
        thread; yarn; breast-feeding; currency exchange; dna; soap; om; locked; locked with pen; locked with key;
        unlocked; potable water; non-potable water; passport control; customs; baggage claim; left luggage;
        children crossing; no entry; prohibited; no bicycles; no smoking; no littering; no pedestrians;
        no mobile phones; no one under eighteen; radioactive; wireless; vibration mode; multiply; plus; minus; divide;
        infinity; copyright; registered; information; construction; input latin uppercase; input latin lowercase;
        input numbers; input symbols; input latin letters; dizzy; dashing away; sunrise over mountains; yin yang;
        statue of liberty; rolling on the floor laughing; star-struck; palms up together; cooking; pouring liquid;
        kaaba""",
    )
)
SINGULAR_IN_S = {"rhinoceros", "americas", "weights", "arts", "customs", "stars", "tears"}  # not plurals
PLURAL_WORDS = {"people", "skis"}
AN_DESPITE_CONSONANT = {"x-ray", "sos", "ng", "atm", "hourglass"}
A_DESPITE_VOWEL = {"unicorn", "ewe", "one-piece", "euro"}

# In these emojibase subgroups no name includes another, so a concept of the same subgroup is a fair wrong answer.
EXCLUSIVE_SUBGROUPS = {
    "animal-mammal", "animal-reptile", "food-fruit", "food-vegetable", "food-prepared", "food-sweet",
    "musical-instrument", "sport", "zodiac", "transport-air", "geometric", "tool", "science", "arrow",
}  # fmt: skip
# Exceptions: two names that both have a word of the same kind are confusable. A heart suit looks like a red heart.
KINDS = (
    {"dog", "poodle"}, {"bear", "panda", "koala"}, {"mouse", "rat", "hamster", "chipmunk"},
    {"monkey", "gorilla", "orangutan"}, {"ox", "cow", "buffalo", "bison"}, {"goat", "ram", "ewe"},
    {"bread", "bagel", "croissant", "flatbread"}, {"pig", "boar"}, {"horse", "unicorn", "donkey"},
    {"baseball", "softball"}, {"cake", "shortcake", "cupcake"}, {"candy", "lollipop"}, {"lemon", "lime"}, {"pepper"},
    {"taco", "burrito", "tamale", "flatbread"}, {"pot", "pan", "fondue", "bowl"}, {"meat", "poultry", "bacon"},
    {"heart"}, {"diamond"}, {"star", "sparkle", "asterisk"}, {"circle", "moon", "hole"}, {"button", "large"},
    {"triangle", "button"}, {"tree"}, {"tent", "camping"}, {"sun", "sunrise", "sunset"}, {"chart"}, {"chain", "link"},
    {"envelope", "mail", "letter"}, {"football"}, {"droplet", "drop"}, {"mouth", "kiss", "lip"}, {"calendar"},
    {"top", "up"}, {"soon", "right"}, {"back", "end", "left"}, {"on", "left"},
)  # fmt: skip
# First parts of subgroup names. In these subgroups one name often fits another thing: a princess is also a "woman".
BROAD_SUBGROUPS = ("face", "person", "hand", "cat", "monkey")

DEMO = frozenset(  # things of the demo: well known, and easy to tell apart
    """
    ant bat bear bird butterfly cactus camel cat chicken cow crab cricket crocodile deer dog dolphin dove duck
    elephant fish frog goat gorilla honeybee horse koala lady-beetle leopard lion lizard monkey mouse mushroom
    octopus owl panda penguin pig rabbit rhinoceros rooster rose scorpion shark snail snake spider sunflower
    tiger tulip turtle whale wolf avocado banana bread burrito carrot cherries cookie croissant doughnut egg
    eggplant french-fries grapes hamburger hot-dog hot-pepper ice-cream lemon lollipop peach pear pineapple
    pizza popcorn strawberry taco tomato watermelon wine-glass airplane ambulance anchor automobile bicycle bus
    castle fire helicopter rainbow rocket sailboat snowman tractor
    """.split()
)


@dataclass(frozen=True)
class Concept:
    """Describe one emoji. `slug` is its CLDR short name with hyphens, `group` is a key of `CATEGORIES`."""

    hexcode: str
    slug: str
    en: str
    zh: str
    group: int
    subgroup: str

    def name(self, language: str) -> str:
        """Return the name in `language`, "en" or "zh"."""
        return self.en if language == "en" else self.zh

    @cached_property
    def words(self) -> frozenset:
        """Return the words of the English name, without the plural s."""
        return frozenset(re.sub(r"(?<=[a-z]{2})s$", "", word) for word in re.split(r"[^a-z0-9ñ]+", self.en) if word)

    @cached_property
    def is_plural(self) -> bool:
        """Return whether the English name is a plural."""
        head = re.split(r" (?:with|of|in|over|and|without) ", self.en)[0].split()
        if self.en in BARE_NAMES or head[-1] in SINGULAR_IN_S:
            return False
        return bool(PLURAL_WORDS & set(head)) or bool(re.search(r"[^sui]s$", head[-1]) and not head[-1].endswith("'s"))

    @cached_property
    def phrase(self) -> str:
        """Return the English name with its indefinite article, if it takes one."""
        if self.is_plural or self.en in BARE_NAMES:
            return self.en
        word = re.split(r"[ !]", self.en)[0]
        vowel = word[0] in "aeiou" and word not in A_DESPITE_VOWEL
        return f"{'an' if vowel or word in AN_DESPITE_CONSONANT else 'a'} {self.en}"


def confusable(a: Concept, b: Concept) -> bool:
    """Return whether the name of one concept might also fit the other.

    Such a pair never stands in one question or scene.
    """
    if a.words <= b.words or b.words <= a.words or a.zh in b.zh or b.zh in a.zh:
        return True
    if any(a.words & kind and b.words & kind for kind in KINDS):
        return True
    if a.subgroup == b.subgroup:
        return a.subgroup not in EXCLUSIVE_SUBGROUPS
    first, second = a.subgroup.split("-")[0], b.subgroup.split("-")[0]
    return first == second and first in BROAD_SUBGROUPS


def draw_other(rng, pool: list[Concept], present: list[Concept], near: bool = False) -> Concept:
    """Return a random concept of `pool` that is not confusable with any in `present`.

    With `near`, a concept of the same subgroup or category as the first in `present` is preferred.
    """
    first = present[0]
    exclusive = first.subgroup in EXCLUSIVE_SUBGROUPS
    close = []
    if near:
        close = [c for c in pool if (c.subgroup == first.subgroup if exclusive else c.group == first.group)]
    for attempt in range(1000):
        other = rng.choice(close if close and attempt < 30 else pool)
        if not any(confusable(other, p) for p in present):
            return other
    raise ValueError(f"None of {len(pool)} concepts is distinct from {[c.en for c in present]}: use more concepts.")
