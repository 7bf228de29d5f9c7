"""Write the questions and answers of the embedded data set, in English and Chinese.

`single_rows` asks about a picture of one thing, `scene_rows` about a picture of several things. The first phrasing of
each task is the canonical one. The evaluation files use only this one, the training files use all.
"""

from typing import NamedTuple

from tools.emoji.concepts import CATEGORIES, LANGUAGES, PROPER_NAMES, Concept, draw_other

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
    ("point", "en"): (
        "Point to {the}.", "Give a point on {the}.", "Mark {the} with a point.", "At which point {be} {the}?",
        "Where must one click to hit {the}?",
    ),
    ("point", "zh"): (
        "指出{name}的位置。", "请用一个点指出{name}。", "给出{name}上的一点。", "{name}在哪一点？", "要点中{name}，应点哪里？",
    ),
    ("box", "en"): (
        "Where exactly {be} {the}? Answer with {its} box.", "Give the box of {the}.", "Draw a box around {the}.",
        "What is the bounding box of {the}?", "Between which edges {be} {the}?",
    ),
    ("box", "zh"): (
        "{name}的边框在哪里？", "请框出{name}。", "给出{name}的边框。", "{name}的外框坐标是什么？", "用边框标出{name}。",
    ),
    ("above", "en"): (
        "What is above {the}?", "What do you see above {the}?", "Which thing is above {the}?",
        "Name the thing above {the}.", "What stands over {the}?",
    ),
    ("above", "zh"): (
        "{name}的上面是什么？", "在{name}上面的是什么？", "哪个东西在{name}的上面？", "说出{name}上面的东西。", "你在{name}的上面看到什么？",
    ),
    ("count_colour", "en"): (
        'How many "{name}" are {colour}?', 'How many times does a {colour} "{name}" appear?',
        'Count the "{name}" that are {colour}.', 'How many of the "{name}" have the color {colour}?',
        'What is the number of {colour} "{name}"?',
    ),
    ("count_colour", "zh"): (
        "有几个{colour}的“{name}”？", "{colour}的“{name}”出现了几次？", "数一数{colour}的“{name}”。", "图中{colour}的“{name}”有几个？",
        "“{name}”里有几个是{colour}的？",
    ),
}  # fmt: skip
TASKS = tuple(task for task, language in PHRASES if language == "en")


class Row(NamedTuple):
    """Hold a question about a picture, with its answer.

    `options` are the names that a choice offers, `box` is the place of what is asked for, in per cent of the picture,
    and `about` are the concepts that the question names: those of the options, or one, or none.
    """

    task: str
    language: str
    question: str
    answer: str
    options: list[str] | None = None
    box: tuple[int, int, int, int] | None = None
    about: tuple[Concept, ...] = ()


def ask(rng, task: str, language: str, canonical: bool, concept: Concept = None, **values) -> str:
    """Return a question of the task in one of its phrasings.

    With `canonical` this is always the canonical one; otherwise it is the canonical one three times in ten.
    """
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
            its="their" if many else "its",
            the=concept.en if concept.en in PROPER_NAMES else f"the {concept.en}",
        )
    return phrase.format(**values)


def options(rng, answer: Concept, pool: list[Concept], shown: list[Concept] = ()) -> list[Concept]:
    """Return four concepts in random order: the answer, and three that fit neither the picture nor each other.

    Args:
        shown: what else the picture shows.
    """
    offered, others = [answer], [concept for concept in shown if concept is not answer]
    while len(offered) < 4:
        offered.append(draw_other(rng, pool, offered + others, near=len(offered) == 1 and rng.random() < 0.5))
    rng.shuffle(offered)
    return offered


def choice_row(rng, language: str, canonical: bool, answer: Concept, offered: list[Concept]) -> Row:
    """Return the question which of the concepts that are offered the picture shows."""
    names = [concept.name(language) for concept in offered]
    question = ask(rng, "choice", language, canonical, options=listed(names, language))
    return Row("choice", language, question, answer.name(language), names, about=tuple(offered))


def listed(names: list[str], language: str) -> str:
    """Return the names as one text, in English "a, b, c or d"."""
    return "、".join(names) if language == "zh" else f"{', '.join(names[:-1])} or {names[-1]}"


def color_name(color: str, language: str) -> str:
    """Return the name of a colour in `language`."""
    return color if language == "en" else COLORS[color]


def single_rows(rng, index: int, concept: Concept, main, background: str, pool: list, wanted: list) -> list[Row]:
    """Return rows on a picture of one thing.

    Args:
        index: number of the picture in a random order; even and odd numbers balance yes and no.
        main: name of the main colour of the thing, None if it is not clear.
        background: name of the colour of the background.
        pool: concepts from which wrong names are drawn, the same as those of the pictures.
        wanted: triples (task, language, canonical).
    """
    rows, turn = [], index
    for task, language, canonical in wanted:
        which = LANGUAGES.index(language)
        shown = None
        if task == "choice":
            rows.append(choice_row(rng, language, canonical, concept, options(rng, concept, pool)))
            continue
        if task == "caption":
            answer = single_caption(concept, background, language)
        elif task == "name":
            answer = concept.name(language)
        elif task == "category":
            answer = CATEGORIES[concept.group][which]
        elif task == "yes_no":
            yes, turn = turn % 2, turn + 1
            shown = concept if yes else draw_other(rng, pool, [concept], near=rng.random() < 0.5)
            answer = YES_NO[language][yes]
        elif task == "colour":
            if main is None:
                continue
            answer = color_name(main, language)
        elif task == "background":
            answer = color_name(background, language)
        about = () if shown is None else (shown,)
        rows.append(Row(task, language, ask(rng, task, language, canonical, shown), answer, about=about))
    return rows


def single_caption(concept: Concept, background: str, language: str) -> str:
    """Return a caption for one thing on a background."""
    category = CATEGORIES[concept.group][LANGUAGES.index(language)]
    if language == "en":
        start = concept.phrase[0].upper() + concept.phrase[1:]
        return f"{start} on {article(background)} {background} background. Category: {category}."
    return f"{COLORS[background]}背景上的{concept.zh}。类别：{category}。"


def article(word: str) -> str:
    """Return the indefinite article of an English word."""
    return "an" if word[0] in "aeiou" else "a"


def scene_caption(things: list, background: str, language: str) -> str:
    """Return a caption for a scene; `things` are (concept, position) pairs in reading order."""
    which = LANGUAGES.index(language)
    if language == "zh":
        parts = "，".join(f"{POSITIONS[position][1]}是{concept.zh}" for concept, position in things)
        return f"{COLORS[background]}背景上有{len(things)}个东西：{parts}。"
    parts = [f"{concept.phrase} ({POSITIONS[position][which]})" for concept, position in things]
    number = "1 thing" if len(things) == 1 else f"{len(things)} things"
    return f"{article(background).capitalize()} {background} background with {number}: {', '.join(parts)}."


def scene_rows(rng, index: int, things: list, background: str, pool: list, canonical: bool, repeats: int) -> list[Row]:
    """Return rows on a scene.

    Args:
        index: number of the scene in a random order; it decides the first language, and yes or no.
        things: (concept, position) pairs in reading order; `position` is a key of `POSITIONS`.
        pool: concepts that may stand in such a scene; "is there" asks for one of these where the answer is no.
        repeats: number of questions per task; the language changes from one to the next.
    """
    concepts = [concept for concept, _ in things]
    kinds = list(dict.fromkeys(concepts))
    once = [(c, p) for c, p in things if concepts.count(c) == 1]
    left = [(c, found) for c, p in once if (found := only_left(things, p)) is not None]
    rows = []
    for turn in range(repeats):
        language = LANGUAGES[(index // 2 + turn) % 2]

        def add(task, answer, shown=None):
            about = () if shown is None else (shown,)
            rows.append(Row(task, language, ask(rng, task, language, canonical, shown), answer, about=about))

        add("count", str(len(things)))
        kind = rng.choice(kinds if rng.random() < 0.4 else [c for c in kinds if concepts.count(c) > 1] or kinds)
        add("count_kind", str(concepts.count(kind)), kind)
        yes = (index + turn) % 2
        if turn < 2:  # one yes and one no, or one of them
            add("exists", YES_NO[language][yes], rng.choice(kinds) if yes else draw_other(rng, pool, kinds))
        if once:
            concept, position = rng.choice(once)
            add("where", POSITIONS[position][LANGUAGES.index(language)], concept)
        if left:
            concept, found = rng.choice(left)
            add("left_of", found.name(language), concept)
        if turn == 0:  # these have few different answers, so one is enough
            add("background", color_name(background, language))
            add("caption", scene_caption(things, background, language))
    return rows


def only_before(things: list, position: tuple, axis: int) -> Concept | None:
    """Return the only thing before `position` along an axis if the other axis has the same place, else None.

    Args:
        things: (concept, position) pairs; a position is (grid, row, column).
        axis: 1 for rows, 2 for columns.
    """
    found = [(concept, place) for concept, place in things if place[axis] < position[axis]]
    other = 3 - axis
    return found[0][0] if len(found) == 1 and found[0][1][other] == position[other] else None


def only_left(things: list, position: tuple) -> Concept | None:
    """Return the only thing left of `position` if it is in the same row, else None."""
    return only_before(things, position, axis=2)


def only_above(things: list, position: tuple) -> Concept | None:
    """Return the only thing above `position` if it is in the same column, else None."""
    return only_before(things, position, axis=1)
