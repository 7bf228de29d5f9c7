"""Give tests of the emoji data made-up drawings, and the questions and answers that are allowed."""

from PIL import Image, ImageDraw

from tools.emoji.concepts import CATEGORIES, Concept
from tools.emoji.drawings import Drawings
from tools.emoji.pictures import BACKGROUNDS
from tools.emoji.questions import COLORS, POSITIONS

STYLES = ("noto", "symbola")  # one with colours, one of a single colour


def concept(number: int) -> Concept:
    """Return a concept with a made-up name that depends on `number`; its Chinese name is in no question otherwise."""
    name = "".join("bdfgklmnprstvz"[(number // 14**i) % 14] + "aeiou"[(number + i) % 5] for i in range(3))
    return Concept(f"{number}", name, name, chr(0x9F00 + number), number % 2, f"s{number}")


CONCEPTS = [concept(number) for number in range(24)]


def make_drawings(styles=STYLES) -> Drawings:
    """Return one drawing per style and concept, each with its own shape and, but for symbola, its own colour."""
    found = []
    for style in styles:
        for number, thing in enumerate(CONCEPTS):
            sprite = Image.new("RGBA", (40 + number, 64 - number))
            shade = (0, 0, 0) if style == "symbola" else BACKGROUNDS[sorted(BACKGROUNDS)[number % 11]][0]
            ImageDraw.Draw(sprite).ellipse((0, 0, sprite.width - 1, sprite.height - 1), fill=(*shade, 255))
            found.append((style, thing, sprite))
    return Drawings.gather(found)


def allowed_answers() -> dict[tuple[str, str], set[str]]:
    """Return the answers of each task and language that has few."""
    allowed = {("yes_no", "en"): {"yes", "no"}, ("yes_no", "zh"): {"是", "否"}}
    for which, language in enumerate(("en", "zh")):
        allowed["category", language] = {pair[which] for pair in CATEGORIES.values()}
        allowed["where", language] = {pair[which] for pair in POSITIONS.values()}
        colors = set(COLORS) if language == "en" else set(COLORS.values())
        allowed["colour", language] = allowed["background", language] = colors
        allowed["exists", language] = allowed["yes_no", language]
        allowed["count", language], allowed["count_kind", language] = set("12345"), set("123")
        allowed["count_colour", language] = set("0123")
    return allowed


CANONICAL = {  # patterns of the questions in the table of data/README.md
    ("caption", "en"): r"Describe this picture\.",
    ("caption", "zh"): r"描述这张图片。",
    ("name", "en"): r"What is this\? Answer with the name\.",
    ("name", "zh"): r"这是什么？只回答名称。",
    ("category", "en"): r"Which category does it belong to\?",
    ("category", "zh"): r"它属于哪一类？",
    ("choice", "en"): r"Which one is it: .+, .+, .+ or .+\?",
    ("choice", "zh"): r"它是哪一个：.+、.+、.+、.+？",
    ("yes_no", "en"): r"(Is this (an? )?|Are these )[^?]+\? Answer yes or no\.",
    ("yes_no", "zh"): r"这是.+吗？回答是或否。",
    ("colour", "en"): r"What is its main color\?",
    ("colour", "zh"): r"它的主要颜色是什么？",
    ("count", "en"): r"How many things are in the picture\?",
    ("count", "zh"): r"图片里一共有几个东西？",
    ("count_kind", "en"): r'How many times does ".+" appear\?',
    ("count_kind", "zh"): r"“.+”出现了几次？",
    ("exists", "en"): r"(Is there (an? )?|Are there ).+ in the picture\?",
    ("exists", "zh"): r"图片里有.+吗？",
    ("where", "en"): r"Where (is|are) (the )?.+\?",
    ("where", "zh"): r".+在哪里？",
    ("left_of", "en"): r"What is to the left of (the )?.+\?",
    ("left_of", "zh"): r".+的左边是什么？",
    ("background", "en"): r"What color is the background\?",
    ("background", "zh"): r"背景是什么颜色？",
    ("point", "en"): r"Point to (the )?.+\.",
    ("point", "zh"): r"指出.+的位置。",
    ("box", "en"): r"Where exactly (is|are) (the )?.+\? Answer with (its|their) box\.",
    ("box", "zh"): r".+的边框在哪里？",
    ("above", "en"): r"What is above (the )?.+\?",
    ("above", "zh"): r".+的上面是什么？",
    ("count_colour", "en"): r'How many ".+" are \w+\?',
    ("count_colour", "zh"): r"有几个.色的“.+”？",
}
