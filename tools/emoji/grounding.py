"""Write questions about places and questions in two steps; `minivlm/evaluation/grounding.py` scores the answers.

Places are in per cent of the picture's width and height, from the top left corner: a point is "37,62", a box is
"12,40,55,88" (left, top, right, bottom). They are computed from where each thing was drawn, so they are exact.
"""

from tools.emoji.concepts import LANGUAGES, Concept
from tools.emoji.pictures import BACKGROUNDS, SIZE
from tools.emoji.questions import Row, ask, color_name, only_above

GROUNDING_TASKS = ("point", "box", "above", "count_colour")


def to_percent(box: tuple) -> tuple[int, int, int, int]:
    """Return a box in pixels as whole per cent of the picture."""
    return tuple(round(100 * value / SIZE) for value in box)


def grounding_rows(rng, index: int, things: list, canonical: bool) -> list[Row]:
    """Return rows on a scene, one per task that has an answer.

    Args:
        index: number of the scene; even or odd decides the language of each task.
        things: list of `scenes.Thing`.
        canonical: True for questions in their canonical form.
    """
    concepts = [thing.concept for thing in things]
    once = [thing for thing in things if concepts.count(thing.concept) == 1]
    pairs = [(thing.concept, thing.position) for thing in things]
    rows = []

    def add(task, turn, concept, answer, box=None, **values):
        language = LANGUAGES[(index + turn) % 2]
        values = {key: color_name(value, language) for key, value in values.items()}
        answer = answer.name(language) if isinstance(answer, Concept) else answer
        question = ask(rng, task, language, canonical, concept, **values)
        rows.append(Row(task, language, question, answer, box=box, about=(concept,)))

    if once:
        thing = rng.choice(once)
        left, top, right, bottom = thing.box
        x, y = round(50 * (left + right) / SIZE), round(50 * (top + bottom) / SIZE)
        add("point", 0, thing.concept, f"{x},{y}", to_percent(thing.box))
        thing = rng.choice(once)
        add("box", 1, thing.concept, ",".join(map(str, to_percent(thing.box))), to_percent(thing.box))
    above = [(thing.concept, found) for thing in once if (found := only_above(pairs, thing.position))]
    if above:
        add("above", 0, *rng.choice(above))
    if kind := colour_question(rng, things):
        concept, colour, count = kind
        add("count_colour", 1, concept, str(count), colour=colour)
    return rows


def colour_question(rng, things: list) -> tuple[Concept, str, int] | None:
    """Return a concept, a colour, and how many copies of the concept have this colour: none, some or all.

    All copies of the concept have a clear colour. Return None if the scene has no such concept.
    """
    clear = [c for c in dict.fromkeys(t.concept for t in things) if all(t.colour for t in things if t.concept is c)]
    if not clear:
        return None
    concept = rng.choice(clear)
    colours = [thing.colour for thing in things if thing.concept is concept]
    # Half of the wrong colours are those of other things, so a model that looks only at the colour answers wrong.
    others = sorted({t.colour for t in things if t.colour} - set(colours))
    if rng.random() < 0.3:
        colour = rng.choice(others if others and rng.random() < 0.5 else sorted(BACKGROUNDS.keys() - set(colours)))
    else:
        colour = rng.choice(colours)
    return concept, colour, colours.count(colour)
