"""Questions of the embedded data set: concepts, their names in English and Chinese, and rows of text.

A concept is one emoji: its hexcode, its names (Unicode CLDR short names), its category. `single_rows` asks about a
picture of one thing, `scene_rows` about a picture of several. The first phrasing of each task is the canonical one,
which the evaluation files use; training draws from all of them.
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
COLORS = {
    "black": "黑色", "white": "白色", "grey": "灰色", "red": "红色", "orange": "橙色", "yellow": "黄色",
    "green": "绿色", "blue": "蓝色", "purple": "紫色", "pink": "粉色", "brown": "棕色",
}  # fmt: skip
POSITIONS = {  # (rows of the grid, row, column) -> name
    (2, 0, 0): ("top left", "左上"), (2, 0, 1): ("top right", "右上"),
    (2, 1, 0): ("bottom left", "左下"), (2, 1, 1): ("bottom right", "右下"),
    (3, 0, 0): ("top left", "左上"), (3, 0, 1): ("top", "上方"), (3, 0, 2): ("top right", "右上"),
    (3, 1, 0): ("left", "左边"), (3, 1, 1): ("centre", "中间"), (3, 1, 2): ("right", "右边"),
    (3, 2, 0): ("bottom left", "左下"), (3, 2, 1): ("bottom", "下方"), (3, 2, 2): ("bottom right", "右下"),
}  # fmt: skip
YES_NO = {"en": ("no", "yes"), "zh": ("否", "是")}

PHRASES = {
    ("caption", "en"): (
        "Describe this picture.", "What does the picture show?", "Write a caption for this picture.",
        "Give a short description of the picture.", "Please describe what you see.", "Caption this.",
    ),
    ("caption", "zh"): (
        "描述这张图片。", "这张图片里有什么？", "请为这张图片写一句说明。", "简单描述一下这张图。", "说说你看到了什么。", "请描述图片内容。",
    ),
    ("name", "en"): (
        "What is this? Answer with the name.", "What is shown here? Give only the name.", "Name the thing in the picture.",
        "What do you see? Answer with its name.", "Which emoji is this? Answer with the name.", "Identify this. Name only.",
    ),
    ("name", "zh"): (
        "这是什么？只回答名称。", "图中是什么？只说名称。", "请说出图中东西的名称。", "你看到了什么？只回答名称。", "这个表情符号叫什么？只回答名称。", "识别这张图，只回答名称。",
    ),
    ("category", "en"): (
        "Which category does it belong to?", "What category is this?", "What kind of thing is it? Give the category.",
        "Name the category of the thing in the picture.", "Into which category does this fall?",
    ),
    ("category", "zh"): (
        "它属于哪一类？", "这是哪个类别的东西？", "图中的东西属于什么类别？", "请说出它的类别。", "它应该归到哪一类？",
    ),
    ("choice", "en"): (
        "Which one is it: {options}?", "What is this: {options}?", "Choose the right name: {options}?",
        "Is this {options}? Answer with one of them.", "Pick what the picture shows: {options}.",
    ),
    ("choice", "zh"): (
        "它是哪一个：{options}？", "这是什么：{options}？", "从中选一个正确的名称：{options}。", "图中是下面哪一个：{options}？", "请选择图片里的东西：{options}。",
    ),
    ("yes_no", "en"): (
        "{is_this} {x}? Answer yes or no.", "Yes or no: {is_this_low} {x}?", "Does the picture show {x}? Answer yes or no.",
        "Do you see {x} here? Yes or no.", "{is_} {x} shown in this picture? Answer yes or no.",
    ),
    ("yes_no", "zh"): (
        "这是{x}吗？回答是或否。", "图中的是{x}吗？请回答是或否。", "是或否：这是{x}吗？", "图片画的是{x}吗？回答是或否。", "你看到的是{x}吗？只回答是或否。",
    ),
    ("colour", "en"): (
        "What is its main color?", "What color is it mostly?", "Which color covers most of the thing?",
        "Name the main color of the thing.", "Mainly, what color is this thing?",
    ),
    ("colour", "zh"): (
        "它的主要颜色是什么？", "它主要是什么颜色？", "这个东西以什么颜色为主？", "请说出它的主色。", "图中的东西大部分是什么颜色？",
    ),
    ("count", "en"): (
        "How many things are in the picture?", "How many things do you see?", "Count the things in the picture.",
        "What is the number of things shown?", "How many objects are there in all?",
    ),
    ("count", "zh"): (
        "图片里一共有几个东西？", "图中有几个东西？", "数一数图片里的东西。", "你看到几个东西？", "总共有多少个东西？",
    ),
    ("count_kind", "en"): (
        'How many times does "{name}" appear?', 'How often do you see "{name}"?', 'Count the "{name}" in the picture.',
        'How many of the things are "{name}"?', 'What is the number of "{name}" here?',
    ),
    ("count_kind", "zh"): (
        "“{name}”出现了几次？", "图中有几个“{name}”？", "数一数有多少个“{name}”。", "你看到几个“{name}”？", "“{name}”一共有几个？",
    ),
    ("exists", "en"): (
        "{is_there} {x} in the picture?", "Can you see {x} in the picture?", "Does the picture contain {x}?",
        "{is_} {x} among the things shown?", "{does} {x} appear in the picture?",
    ),
    ("exists", "zh"): (
        "图片里有{x}吗？", "图中能看到{x}吗？", "这张图里有没有{x}？", "图中的东西里有{x}吗？", "你能找到{x}吗？",
    ),
    ("where", "en"): (
        "Where {be} {the}?", "In which part of the picture {be} {the}?", "Give the position of {the}.",
        "Where in the picture {be} {the}?", "What is the position of {the}?",
    ),
    ("where", "zh"): (
        "{name}在哪里？", "{name}在图片的什么位置？", "请说出{name}的位置。", "{name}位于图中哪里？", "{name}在图的哪个部分？",
    ),
    ("left_of", "en"): (
        "What is to the left of {the}?", "What is on the left of {the}?", "Which thing is left of {the}?",
        "Name the thing to the left of {the}.", "What do you see to the left of {the}?",
    ),
    ("left_of", "zh"): (
        "{name}的左边是什么？", "在{name}左边的是什么？", "哪个东西在{name}的左边？", "说出{name}左边的东西。", "你在{name}的左边看到什么？",
    ),
    ("background", "en"): (
        "What color is the background?", "Which color is behind the things?", "Name the color of the background.",
        "What is the background color?", "On what color are the things drawn?",
    ),
    ("background", "zh"): (
        "背景是什么颜色？", "图片的背景是哪种颜色？", "请说出背景的颜色。", "背景用的是什么颜色？", "这些东西后面是什么颜色？",
    ),
}  # fmt: skip
TASKS = tuple(task for task, language in PHRASES if language == "en")


# Names that take no indefinite article, the proper ones no article at all: substances, proper names, games, signs and states.
PROPER_NAMES = frozenset(
    """aries taurus gemini cancer leo virgo libra scorpio sagittarius capricorn aquarius pisces ophiuchus""".split()
    + ["mount fuji", "santa claus", "mrs. claus", "tokyo tower", "zzz"]
)
BARE_NAMES = PROPER_NAMES | frozenset(
    re.split(
        r";\s+",
        """camping; foggy; night with stars; fog; high voltage; building construction; wood; bread; baguette bread;
        flatbread; stuffed flatbread; garlic; ginger root; bacon; popcorn; butter; salt; canned food; cooked rice;
        curry rice; spaghetti; oden; sushi; shaved ice; soft ice cream; ice cream; custard; sake; bubble tea; mate; ice;
        money with wings; coral; broccoli; fire; luggage; performing arts; tennis; bowling; field hockey; ice hockey;
        lacrosse; ping pong; badminton; american football; rugby football; horse racing; nail polish; thread; yarn;
        breast-feeding; currency exchange; dna; soap; om; locked; locked with pen; locked with key; unlocked;
        potable water; non-potable water; passport control; customs; baggage claim; left luggage; children crossing;
        no entry; prohibited; no bicycles; no smoking; no littering; no pedestrians; no mobile phones;
        no one under eighteen; radioactive; wireless; vibration mode; multiply; plus; minus; divide; infinity;
        copyright; registered; information; construction; input latin uppercase; input latin lowercase; input numbers;
        input symbols; input latin letters; dizzy; dashing away; sunrise over mountains; yin yang; statue of liberty;
        rolling on the floor laughing; star-struck; palms up together; cooking; pouring liquid; kaaba""",
    )
)
SINGULAR_IN_S = {"rhinoceros", "americas", "weights", "arts", "customs", "stars", "tears"}  # no plurals
PLURAL_WORDS = {"people", "skis"}
AN_DESPITE_CONSONANT = {"x-ray", "sos", "ng", "atm", "hourglass"}
A_DESPITE_VOWEL = {"unicorn", "ewe", "one-piece", "euro"}

# Inside these emojibase subgroups no name is a broader word for another, so a neighbour is a fair wrong answer.
EXCLUSIVE_SUBGROUPS = {
    "animal-mammal", "animal-reptile", "food-fruit", "food-vegetable", "food-prepared", "food-sweet", "musical-instrument",
    "sport", "zodiac", "transport-air", "geometric", "tool", "science", "arrow",
}  # fmt: skip
# ... except within these kinds. Some reach across subgroups: a heart suit looks like a red heart.
KINDS = (
    {"dog", "poodle"}, {"bear", "panda", "koala"}, {"mouse", "rat", "hamster", "chipmunk"}, {"monkey", "gorilla", "orangutan"},
    {"ox", "cow", "buffalo", "bison"}, {"goat", "ram", "ewe"}, {"bread", "bagel", "croissant", "flatbread"}, {"pig", "boar"},
    {"horse", "unicorn", "donkey"}, {"baseball", "softball"}, {"cake", "shortcake", "cupcake"}, {"candy", "lollipop"}, {"lemon", "lime"}, {"pepper"},
    {"taco", "burrito", "tamale", "flatbread"}, {"pot", "pan", "fondue", "bowl"}, {"meat", "poultry", "bacon"},
    {"heart"}, {"diamond"}, {"star", "sparkle", "asterisk"}, {"circle", "moon", "hole"}, {"button", "large"},
    {"triangle", "button"}, {"tree"}, {"tent", "camping"}, {"sun", "sunrise", "sunset"}, {"chart"}, {"chain", "link"},
    {"envelope", "mail", "letter"}, {"football"}, {"droplet", "drop"}, {"mouth", "kiss", "lip"}, {"calendar"},
    {"top", "up"}, {"soon", "right"}, {"back", "end", "left"}, {"on", "left"},
)  # fmt: skip
# Parts of the people and the faces: "woman" also fits a princess, "smiling face" a grinning one.
BROAD_SUBGROUPS = ("face", "person", "hand", "cat", "monkey")


@dataclass(frozen=True)
class Concept:
    """One emoji. `slug` is its CLDR short name with hyphens, `group` a key of `CATEGORIES`."""

    hexcode: str
    slug: str
    en: str
    zh: str
    group: int
    subgroup: str

    def name(self, language: str) -> str:
        return self.en if language == "en" else self.zh

    @cached_property
    def words(self) -> frozenset:
        return frozenset(re.sub(r"(?<=[a-z]{2})s$", "", word) for word in re.split(r"[^a-z0-9ñ]+", self.en) if word)

    @cached_property
    def is_plural(self) -> bool:
        head = re.split(r" (?:with|of|in|over|and|without) ", self.en)[0].split()
        if self.en in BARE_NAMES or head[-1] in SINGULAR_IN_S:
            return False
        return bool(PLURAL_WORDS & set(head)) or bool(re.search(r"[^sui]s$", head[-1]) and not head[-1].endswith("'s"))

    @cached_property
    def phrase(self) -> str:
        """The name with its indefinite article, if it takes one."""
        if self.is_plural or self.en in BARE_NAMES:
            return self.en
        word = re.split(r"[ !]", self.en)[0]
        vowel = word[0] in "aeiou" and word not in A_DESPITE_VOWEL
        return f"{'an' if vowel or word in AN_DESPITE_CONSONANT else 'a'} {self.en}"


def confusable(a: Concept, b: Concept) -> bool:
    """Whether one name might also be given to the other thing; such a pair never stands in one question or scene."""
    if a.words <= b.words or b.words <= a.words or a.zh in b.zh or b.zh in a.zh:
        return True
    if any(a.words & kind and b.words & kind for kind in KINDS):
        return True
    if a.subgroup == b.subgroup:
        return a.subgroup not in EXCLUSIVE_SUBGROUPS
    first, second = a.subgroup.split("-")[0], b.subgroup.split("-")[0]
    return first == second and first in BROAD_SUBGROUPS


def draw_other(rng, pool: list[Concept], present: list[Concept], near: bool = False) -> Concept:
    """A concept of `pool` confusable with none in `present`; with `near`, of the same category where possible."""
    first = present[0]
    exclusive = first.subgroup in EXCLUSIVE_SUBGROUPS
    close = []
    if near:
        close = [c for c in pool if (c.subgroup == first.subgroup if exclusive else c.group == first.group)]
    for attempt in range(1000):
        other = rng.choice(close if close and attempt < 30 else pool)
        if not any(confusable(other, p) for p in present):
            return other
    raise ValueError(f"No other concept for {[c.en for c in present]} among {len(pool)}: use more concepts.")


def ask(rng, task: str, language: str, canonical: bool, concept: Concept = None, **values) -> str:
    """A question in one of the task's phrasings; the canonical one always, or three times in ten while training."""
    phrases = PHRASES[task, language]
    phrase = phrases[0] if canonical or rng.random() < 0.3 else rng.choice(phrases[1:])
    if concept is not None:
        many = concept.is_plural
        values.update(
            name=concept.name(language),
            x=concept.phrase if language == "en" else concept.zh,
            is_this="Are these" if many else "Is this",
            is_this_low="are these" if many else "is this",
            is_there="Are there" if many else "Is there",
            is_="Are" if many else "Is",
            does="Do" if many else "Does",
            be="are" if many else "is",
            the=concept.en if concept.en in PROPER_NAMES else f"the {concept.en}",
        )
    return phrase.format(**values)


def options(rng, answer: Concept, pool: list[Concept], language: str) -> list[str]:
    """The answer and three others that fit neither the picture nor one another, in random order."""
    names = [answer]
    while len(names) < 4:
        names.append(draw_other(rng, pool, names, near=len(names) == 1 and rng.random() < 0.5))
    rng.shuffle(names)
    return [c.name(language) for c in names]


def listed(names: list[str], language: str) -> str:
    return "、".join(names) if language == "zh" else f"{', '.join(names[:-1])} or {names[-1]}"


def color_name(color: str, language: str) -> str:
    return color if language == "en" else COLORS[color]


def single_rows(rng, index: int, concept: Concept, main, background: str, pool: list, wanted: list) -> list:
    """Rows (task, language, question, answer, options or None) on a picture of one thing.

    Args:
        index: number of the picture in a random order; its parity balances yes and no.
        main: name of the main colour of the thing, None where it is not clear.
        pool: concepts from which negatives and distractors come, the same as those of the pictures.
        wanted: pairs (task, language), or triples whose third value is True for a canonical question.
    """
    rows, turn = [], index
    for task, language, canonical in wanted:
        which = LANGUAGES.index(language)
        shown, values, names = None, {}, None
        if task == "caption":
            answer = single_caption(concept, background, language)
        elif task == "name":
            answer = concept.name(language)
        elif task == "category":
            answer = CATEGORIES[concept.group][which]
        elif task == "choice":
            answer, names = concept.name(language), options(rng, concept, pool, language)
            values = {"options": listed(names, language)}
        elif task == "yes_no":
            yes, turn = turn % 2, turn + 1
            shown = concept if yes else draw_other(rng, pool, [concept], near=rng.random() < 0.5)
            answer = YES_NO[language][yes]
        elif task == "colour":
            if main is None:
                continue
            answer = color_name(main, language)
        rows.append((task, language, ask(rng, task, language, canonical, shown, **values), answer, names))
    return rows


def single_caption(concept: Concept, background: str, language: str) -> str:
    category = CATEGORIES[concept.group][LANGUAGES.index(language)]
    if language == "en":
        start = concept.phrase[0].upper() + concept.phrase[1:]
        return f"{start} on {article(background)} {background} background. Category: {category}."
    return f"{COLORS[background]}背景上的{concept.zh}。类别：{category}。"


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def scene_caption(things: list, background: str, language: str) -> str:
    """`things` are (concept, position) pairs in reading order."""
    which = LANGUAGES.index(language)
    if language == "zh":
        parts = "，".join(f"{POSITIONS[position][1]}是{concept.zh}" for concept, position in things)
        return f"{COLORS[background]}背景上有{len(things)}个东西：{parts}。"
    parts = [f"{concept.phrase} ({POSITIONS[position][which]})" for concept, position in things]
    number = "1 thing" if len(things) == 1 else f"{len(things)} things"
    return f"{article(background).capitalize()} {background} background with {number}: {', '.join(parts)}."


def scene_rows(rng, index: int, things: list, background: str, pool: list, canonical: bool, repeats: int) -> list:
    """Rows (task, language, question, answer, None) on a scene.

    Args:
        things: (concept, position) pairs in reading order; `position` is a key of `POSITIONS`.
        pool: concepts that may stand in such a scene; the negatives of "is there" come from it.
        repeats: questions per task, each in another language than the one before.
    """
    concepts = [concept for concept, _ in things]
    kinds = list(dict.fromkeys(concepts))
    once = [(c, p) for c, p in things if concepts.count(c) == 1]
    left = [(c, found) for c, p in once if (found := only_left(things, p)) is not None]
    rows = []
    for turn in range(repeats):
        language = LANGUAGES[(index // 2 + turn) % 2]

        def add(task, answer, shown=None):
            rows.append((task, language, ask(rng, task, language, canonical, shown), answer, None))

        add("count", str(len(things)))
        kind = rng.choice(kinds if rng.random() < 0.4 else [c for c in kinds if concepts.count(c) > 1] or kinds)
        add("count_kind", str(concepts.count(kind)), kind)
        yes = (index + turn) % 2
        add("exists", YES_NO[language][yes], rng.choice(kinds) if yes else draw_other(rng, pool, kinds))
        if once:
            concept, position = rng.choice(once)
            add("where", POSITIONS[position][LANGUAGES.index(language)], concept)
        if left:
            concept, found = rng.choice(left)
            add("left_of", found.name(language), concept)
        if turn == 0:  # of low variety: once is enough
            add("background", color_name(background, language))
            add("caption", scene_caption(things, background, language))
    return rows


def only_left(things: list, position: tuple) -> Concept | None:
    """The thing left of `position`, if no other thing of the scene is further left than `position` and it is in its row."""
    grid, row, column = position
    found = [(concept, place) for concept, place in things if place[2] < column]
    if len(found) == 1 and found[0][1][1] == row:
        return found[0][0]
    return None
