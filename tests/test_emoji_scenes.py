"""Test the files of drawings, the scenes made of them, and the questions about places."""

import json
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from helpers.emoji import CONCEPTS, STYLES, make_drawings
from minivlm.evaluation.grounding import is_in_place
from processing_minivlm import to_rgb
from tools.emoji.drawings import Drawings, centred, load_concept_table, save_concept_table
from tools.emoji.grounding import colour_question, grounding_rows, to_percent
from tools.emoji.photos import photo_rows, read_credits, read_resources
from tools.emoji.pictures import BACKGROUNDS, SIZE, choose_ground, draw_single, look
from tools.emoji.questions import only_above, only_left
from tools.emoji.scenes import Album, Thing
from tools.emoji.sources import match_numbered


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    """Return the made-up drawings."""
    return make_drawings()


@pytest.mark.parametrize("style", STYLES)
def test_a_box_holds_its_thing_exactly(drawings, style):
    album = Album(drawings, CONCEPTS)
    for seed in range(30):
        things, _, picture = album.compose(random.Random(seed), style, CONCEPTS)
        pixels = np.asarray(picture).astype(int)
        changed = np.abs(pixels - pixels[0, 0]).sum(2) > 60  # the corner shows the background
        for thing in things:
            left, top, right, bottom = thing.box
            inside = changed[top:bottom, left:right]
            assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
            for edge in (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:]):
                assert edge.any(), (seed, thing)
            changed[top:bottom, left:right] = False
        assert not changed.any(), seed  # nothing is drawn outside the boxes


def test_a_thing_of_one_colour_is_drawn_in_the_colour_that_is_told(drawings):
    album = Album(drawings, CONCEPTS)
    seen = set()
    for seed in range(40):
        things, ground, picture = album.compose(random.Random(seed), "symbola", CONCEPTS)
        for thing in things:
            left, top, right, bottom = thing.box
            middle = picture.getpixel(((left + right) // 2, (top + bottom) // 2))
            assert middle in BACKGROUNDS[thing.colour] and thing.colour != ground
            seen.add(thing.colour)
    assert len(seen) == 11


def test_each_thing_is_drawn_where_it_is_said_to_stand(drawings):
    album = Album(drawings, CONCEPTS)
    for seed in range(30):
        things, _, picture = album.compose(random.Random(seed), "noto", CONCEPTS)
        for thing in things:
            left, top, right, bottom = thing.box
            grid, row, column = thing.position
            x, y = (left + right) // 2, (top + bottom) // 2
            own = BACKGROUNDS[sorted(BACKGROUNDS)[CONCEPTS.index(thing.concept) % 11]][0]
            assert max(abs(a - b) for a, b in zip(picture.getpixel((x, y)), own)) < 4
            assert (y * grid // SIZE, x * grid // SIZE) == (row, column)


@pytest.mark.parametrize("color", BACKGROUNDS)
def test_a_thing_stands_out_from_its_background_and_its_colour_is_known(color):
    sprite = Image.new("RGBA", (100, 80), (*BACKGROUNDS[color][0], 255))
    main, hidden = look(sprite)
    assert main == color
    for seed in range(30):
        ground, shade, worst = choose_ground(random.Random(seed), [hidden])
        assert ground != color and worst <= 1
        assert len(draw_single(random.Random(seed), sprite, shade).getcolors(20_000)) > 1


def things_of(*wanted) -> list[Thing]:
    """Return things of a scene from triples (number of the concept, position, colour)."""
    return [Thing(CONCEPTS[number], place, (10, 10, 50, 60), colour) for number, place, colour in wanted]


def test_two_step_questions_count_kind_and_colour_together():
    scene = things_of((0, (2, 0, 0), "red"), (0, (2, 0, 1), "blue"), (0, (2, 1, 0), "red"), (1, (2, 1, 1), "green"))
    found = {colour_question(random.Random(seed), scene) for seed in range(200)}
    counts = {colour: count for kind, colour, count in found if kind is CONCEPTS[0]}
    assert counts["red"] == 2 and counts["blue"] == 1 and counts["green"] == 0
    unclear = things_of((0, (2, 0, 0), "red"), (0, (2, 0, 1), None))
    assert colour_question(random.Random(0), unclear) is None


def test_left_of_is_asked_only_where_one_thing_is_further_left():
    a, b, c = CONCEPTS[:3]
    assert only_left([(a, (2, 0, 0)), (b, (2, 0, 1))], (2, 0, 1)) is a
    assert only_left([(a, (2, 0, 0)), (b, (2, 0, 1))], (2, 0, 0)) is None
    assert only_left([(a, (2, 1, 0)), (b, (2, 0, 1))], (2, 0, 1)) is None  # lower left
    assert only_left([(a, (3, 0, 0)), (b, (3, 0, 1)), (c, (3, 0, 2))], (3, 0, 2)) is None


def test_above_is_asked_only_where_one_thing_is_higher_and_in_the_same_column():
    a, b, c = CONCEPTS[:3]
    assert only_above([(a, (2, 0, 0)), (b, (2, 1, 0))], (2, 1, 0)) is a
    assert only_above([(a, (2, 0, 0)), (b, (2, 1, 0))], (2, 0, 0)) is None
    assert only_above([(a, (2, 0, 1)), (b, (2, 1, 0))], (2, 1, 0)) is None
    assert only_above([(a, (3, 0, 0)), (b, (3, 1, 0)), (c, (3, 2, 0))], (3, 2, 0)) is None


def test_a_layout_is_sought_in_which_the_question_has_an_answer(drawings):
    album, counts = Album(drawings, CONCEPTS), {}
    for wanted in (None, only_above):
        scenes = [album.compose(random.Random(seed), "noto", CONCEPTS, wanted)[0] for seed in range(60)]
        asked = [any(row.task == "above" for row in grounding_rows(random.Random(0), 0, s, True)) for s in scenes]
        counts[wanted] = sum(asked)
    assert counts[only_above] > counts[None] + 10


def test_the_stored_answers_are_right_and_their_neighbours_wrong(drawings):
    album, asked = Album(drawings, CONCEPTS), set()
    for seed in range(40):
        things, *_ = album.compose(random.Random(seed), "noto", CONCEPTS)
        for task, language, question, answer, _, box, _ in grounding_rows(random.Random(seed), seed, things, True):
            asked.add((task, language))
            assert (box is not None) == (task in ("point", "box"))
            if box is None:
                continue
            assert is_in_place(task, answer, box) and is_in_place(task, answer.replace(",", "，") + "。", box)
            others = [to_percent(t.box) for t in things if to_percent(t.box) != box]
            assert not any(is_in_place(task, answer, other) for other in others), question
    assert asked == {
        (task, language) for task in ("point", "box", "above", "count_colour") for language in ("en", "zh")
    }


def test_packed_drawings_keep_their_transparency_and_are_seen_on_white(tmp_path, drawings):
    drawings.pack(tmp_path / "drawings.parquet")
    again = Drawings.unpack(tmp_path / "drawings.parquet")
    assert (again.styles == drawings.styles).all() and (again.concepts == drawings.concepts).all()
    assert again.mono.tolist() == [style == "symbola" for style in drawings.styles]
    alpha, before = again.pixels[:, 3].astype(int), drawings.pixels[:, 3].astype(int)
    assert (
        np.abs(alpha - before).mean() < 3 and (alpha[before == 0] == 0).all() and (alpha[before == 255] == 255).all()
    )
    solid = before == 255
    colour = np.abs(again.pixels[:, :3].astype(int) - drawings.pixels[:, :3].astype(int)).mean(1)
    assert colour[solid].mean() < 6
    seen = to_rgb(Image.fromarray(again.pixels[0].transpose(1, 2, 0), "RGBA"))
    assert seen.getpixel((0, 0)) == (255, 255, 255)


def test_a_drawing_is_centred_with_its_longer_side_whole():
    sprite = Image.new("RGBA", (30, 60), (200, 10, 10, 255))
    alpha = centred(sprite)[3]
    assert alpha.shape == (96, 96) and (alpha[:, 24:72] == 255).all() and not alpha[:, :24].any()


def test_the_concept_table_is_read_as_it_was_written(tmp_path):
    save_concept_table(tmp_path / "concepts.json", CONCEPTS, set(CONCEPTS[:4]))
    assert load_concept_table(tmp_path / "concepts.json") == (CONCEPTS, set(CONCEPTS[:4]))


def test_numbered_drawings_belong_to_one_concept_or_to_none():
    aliases = {"1": {"dog"}, "2": {"dog-face", "dog"}, "3": {"cat"}, "4": {"ox"}}
    names = ["cat-1", "cat-2", "dog-1", "cow", "pistol"]
    found = match_numbered(names, aliases, {"4": "cow"})
    assert found == {"3": ["cat-1", "cat-2"], "4": ["cow"]}  # "dog" could mean two concepts


def pack_resources(files: dict[str, bytes]) -> bytes:
    """Return a Qt resource file of format 3 that holds the files in one folder "a".

    Every other file is compressed.
    """
    names, content, at = b"", b"", {}
    for name in ("a", *files):
        at[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    tree = struct.pack(">IHIIQ", 0, 2, 1, 1, 0) + struct.pack(">IHIIQ", at["a"], 2, len(files), 2, 0)
    for number, (name, data) in enumerate(files.items()):
        tree += struct.pack(">IHHHIQ", at[name], number % 2, 0, 0, len(content), 0)
        stored = struct.pack(">I", len(data)) + zlib.compress(data) if number % 2 else data
        content += struct.pack(">I", len(stored)) + stored
    head = struct.pack(">4sIIIII", b"qres", 3, 24, 24 + len(tree), 24 + len(tree) + len(content), 0)
    return head + tree + content + names


def test_resource_files_are_unpacked_and_others_refused(tmp_path):
    files = {"one.webp": b"first", "two.webp": b"second" * 50, "README": b"third"}
    (tmp_path / "x.rcc").write_bytes(pack_resources(files))
    assert read_resources(tmp_path / "x.rcc") == {f"a/{name}": data for name, data in files.items()}
    (tmp_path / "y.rcc").write_bytes(b"PK" + bytes(30))
    with pytest.raises(ValueError, match="no Qt resource file"):
        read_resources(tmp_path / "y.rcc")


def test_each_photograph_is_credited_as_its_readme_says():
    readme = """Copyright: Somebody
License: CC-BY-2.0
Source: https://example.org/one
Comments: cropping
Files: one.webp

Copyright:
  Copyright 2005 First
  Copyright 2018 Second
License: Public Domain
Comment: original source at https://example.org/two
Files:
  two.webp
b/three.webp
"""
    found = read_credits(readme)
    assert found["one.webp"] == "Somebody; CC-BY-2.0; https://example.org/one"
    assert (
        found["two.webp"] == found["three.webp"] == "2005 First, 2018 Second; Public Domain; https://example.org/two"
    )


def test_photographs_are_asked_for_in_both_languages_and_keep_their_credit():
    picture = Image.radial_gradient("L").convert("RGB")
    rows = photo_rows([(thing.slug, picture, f"by {thing.en}") for thing in CONCEPTS[:8]], CONCEPTS, 0)
    assert len(rows) == 8 * 4
    for row in rows:
        thing = next(c for c in CONCEPTS if c.slug == row["concept"])
        answer = json.loads(row["conversations"])[1]["content"]
        assert answer == thing.name(row["language"]) and row["credit"] == f"by {thing.en}"
        assert row["options"] is None or (answer in row["options"] and len(set(row["options"])) == 4)
