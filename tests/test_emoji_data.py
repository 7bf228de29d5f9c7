"""Test the files of the embedded data set, and the rules that their builder keeps."""

import io
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip("resvg_py")
pytest.importorskip("fontTools")

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from helpers.emoji import CANONICAL, allowed_answers
from minivlm.evaluation.grounding import is_in_place
from tools.emoji import prepare, questions, sources
from tools.emoji.concepts import BARE_NAMES, CATEGORIES, Concept, confusable
from tools.emoji.drawings import load_concept_table
from tools.emoji.grounding import GROUNDING_TASKS
from tools.emoji.photos import FREE
from tools.emoji.questions import PHRASES
from tools.emoji.rows import COLUMNS
from tools.emoji.sources import DEV_STYLE, FIRST_STYLES, TEST_STYLE, TRAIN_STYLES

DATA = Path(__file__).parent.parent / "data"
FILES = ("train", "dev", "test", "test_compositions", "demo_train", "demo_test")
ALSO = ("drawings", "dev_grounding", "test_grounding", "test_photos")
STYLES = {
    "train": set(FIRST_STYLES),
    "dev": {"fxemoji"},
    "test": {"twemoji"},
    "test_compositions": set(FIRST_STYLES),
    "demo_train": set(FIRST_STYLES),
    "demo_test": {"twemoji"},
}


@cache
def table(name: str) -> pa.Table:
    """Return a file of data/ as a table."""
    return pq.read_table(DATA / f"{name}.parquet", read_dictionary=["image_bytes"])


@cache
def rows(name: str) -> list[tuple]:
    """Return (task, language, style, concept, question, answer) of every row of a file."""
    found = []
    for row in table(name).drop_columns("image_bytes").to_pylist():
        user, assistant = json.loads(row["conversations"])
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        marker, question = user["content"].split("\n")
        assert marker == "<image>" and "<image>" not in question
        found.append((row["task"], row["language"], row["style"], row["concept"], question, assistant["content"]))
    return found


def options(name: str) -> list[list[str] | None]:
    """Return the options of every row of a file; None for a question without options."""
    return table(name)["options"].to_pylist()


def pictures(name: str) -> set[bytes]:
    """Return the different pictures of a file, encoded."""
    return {value for chunk in table(name)["image_bytes"].chunks for value in chunk.dictionary.to_pylist()}


def test_files_are_small_and_have_the_columns_of_minimind_v():
    assert sum((DATA / f"{name}.parquet").stat().st_size for name in FILES) <= 13e6
    for name in FILES:
        schema = pq.read_schema(DATA / f"{name}.parquet")
        assert tuple(schema.names) == COLUMNS
        assert schema.field("image_bytes").type == pa.binary() and schema.field("conversations").type == pa.string()
        assert all(column.null_count == 0 for column in table(name).drop_columns("options").columns)


@pytest.mark.parametrize("name", FILES)
def test_one_question_per_row_and_every_answer_is_of_its_kind(name):
    allowed = allowed_answers()
    for task, language, _, _, question, answer in rows(name):
        assert answer in allowed.get((task, language), {answer}) and answer == answer.strip() != "", (question, answer)
        assert (language == "en") == question.isascii() or "ñ" in question, (language, question)
        if language == "en" and task in ("name", "choice", "left_of"):
            assert answer == answer.lower()


@pytest.mark.parametrize("name", FILES)
def test_every_picture_is_128_by_128_and_opaque(name):
    for data in pictures(name):
        picture = Image.open(io.BytesIO(data))
        picture.load()
        assert (picture.format, picture.mode, picture.size) == ("WEBP", "RGB", (128, 128))


def test_a_picture_is_stored_once_per_row_group():
    for name in FILES:
        metadata = pq.ParquetFile(DATA / f"{name}.parquet").metadata
        column = COLUMNS.index("image_bytes")
        stored = sum(
            metadata.row_group(i).column(column).total_uncompressed_size for i in range(metadata.num_row_groups)
        )
        assert stored < 1.1 * sum(map(len, pictures(name)))


def test_no_style_and_no_picture_is_in_training_and_in_a_test_of_styles():
    for name in FILES:
        assert {row[2] for row in rows(name)} == STYLES[name]
    assert STYLES["train"] <= set(TRAIN_STYLES) and len({DEV_STYLE, TEST_STYLE, *TRAIN_STYLES}) == 13
    assert STYLES["dev"] == {DEV_STYLE} and STYLES["test"] == {TEST_STYLE}
    assert not any(pictures("train") & pictures(name) for name in ("dev", "test", "test_compositions"))
    assert not pictures("demo_train") & pictures("demo_test")


def test_demo_asks_about_nothing_but_its_own_things():
    """Check that every option is also taught by the demo; an unknown option would be unfair."""
    for name in ("demo_train", "demo_test"):
        assert {row[3] for row in rows(name)} == prepare.DEMO
        named = {row[5] for row in rows(name) if row[0] == "name"}
        assert {option for listed in options(name) for option in listed or ()} <= named


def test_new_compositions_are_made_of_things_that_the_composer_keeps_out_of_its_scenes():
    concepts, held_out = load_concept_table(DATA / "concepts.json")
    unseen = {slug for row in rows("test_compositions") for slug in row[3].split(",")}
    assert unseen <= {concept.slug for concept in held_out} and len(unseen) > 190
    assert (len(concepts), len(held_out)) == (1358, 204)
    assert {concept.slug for concept in concepts} == {row[3] for row in rows("train")}


@pytest.mark.parametrize("name", FILES)
def test_yes_and_no_are_balanced_in_each_language(name):
    for task in {"yes_no", "exists"} & {row[0] for row in rows(name)}:
        counts = Counter(row[5] for row in rows(name) if row[0] == task)
        for yes, no in (("yes", "no"), ("是", "否")):
            assert abs(counts[yes] - counts[no]) <= max(0.01 * (counts[yes] + counts[no]), 2), counts


def test_no_word_gives_yes_or_no_away():
    """Check that a name asked for often is the right one about half of the time."""
    asked = Counter()
    for task, language, _, _, question, answer in rows("train"):
        if task == "yes_no" and language == "zh":
            asked[re.sub("图中的|图片画的|你看到的|这|是或否：|是|吗.*", "", question), answer] += 1
    share = [
        asked[x, "是"] / (asked[x, "是"] + asked[x, "否"]) for x, _ in asked if asked[x, "是"] + asked[x, "否"] > 4
    ]
    assert len(share) > 500 and 0.4 < sum(share) / len(share) < 0.6


@pytest.mark.parametrize("name", ("train", "dev", "test", "demo_train", "demo_test"))
def test_a_choice_holds_its_answer_once_at_a_uniform_place(name):
    places = Counter()
    for (task, language, _, _, question, answer), listed in zip(rows(name), options(name), strict=True):
        assert (task == "choice") == (listed is not None)
        if listed:
            assert len(set(listed)) == 4 and questions.listed(listed, language) in question
            places[listed.index(answer)] += 1
    total = places.total()
    assert set(places) == {0, 1, 2, 3} and max(places.values()) < 0.25 * total + 3 * (0.1875 * total) ** 0.5


@pytest.mark.parametrize("name", FILES)
def test_canonical_questions_alone_in_evaluation_and_among_others_in_training(name):
    asked = {}
    for task, language, _, _, question, _ in rows(name):
        asked.setdefault((task, language), Counter())[bool(re.fullmatch(CANONICAL[task, language], question))] += 1
    for key, counts in asked.items():
        if "train" in name:
            assert 0.2 < counts[True] / counts.total() < 0.45 and len(PHRASES[key]) >= 5, key
        else:
            assert counts[False] == 0, key


@pytest.mark.parametrize("name", ("dev", "test"))
def test_a_prefix_of_an_evaluation_file_is_a_fair_sample(name):
    start, whole = (Counter(row[0] for row in found) for found in (rows(name)[:1000], rows(name)))
    for task, count in whole.items():
        expected = 1000 * count / whole.total()
        assert abs(start[task] - expected) < 4 * expected**0.5 + 1, task


@pytest.mark.parametrize(("name", "style"), (("dev_grounding", "fxemoji"), ("test_grounding", "twemoji")))
def test_grounding_files_ask_canonically_and_their_boxes_are_inside_the_picture(name, style):
    boxes = table(name)["box"].to_pylist()
    for (task, language, drawn, _, question, answer), box in zip(rows(name), boxes, strict=True):
        assert drawn == style and re.fullmatch(CANONICAL[task, language], question), question
        assert (box is not None) == (task in ("point", "box"))
        if box is not None:
            left, top, right, bottom = box
            assert 0 <= left < right <= 100 and 0 <= top < bottom <= 100 and is_in_place(task, answer, box)
    assert {row[:2] for row in rows(name)} == {
        (task, language) for task in GROUNDING_TASKS for language in ("en", "zh")
    }
    assert not pictures(name) & (pictures("dev") | pictures("test"))


def test_photographs_are_credited_and_free_of_share_alike():
    for credit in table("test_photos")["credit"].to_pylist():
        author, licence, source = credit.split("; ")
        assert author and FREE.fullmatch(licence) and source.startswith("https://")
    for data in pictures("test_photos"):
        assert max(Image.open(io.BytesIO(data)).size) == 224
    known = {row[3] for row in rows("train")}
    assert len({row[3] for row in rows("test_photos")}) == 36 and {row[3] for row in rows("test_photos")} <= known
    assert not pictures("test_photos") & pictures("train")


def concept(en: str, zh: str = "某物", group: int = 7, subgroup: str = "other") -> Concept:
    """Return a concept with an English name; its other fields do not matter to most tests."""
    return Concept("0", en.replace(" ", "-"), en, zh, group, subgroup)


def test_articles_follow_the_sound_and_plurals_have_none():
    phrases = """a dog, an owl, a unicorn, an hourglass done, a one-piece swimsuit, an x-ray, an sos button, a ewe,
        grapes, glasses, bread, a rhinoceros, a cactus, a person lifting weights, chopsticks, an umbrella,
        an a button (blood type), a p button, an up! button, a euro banknote, people hugging, a compass, aries, skis"""
    for phrase in re.split(r",\s+", phrases):
        assert concept(re.sub("^an? (?=.)", "", phrase)).phrase == phrase


def test_names_without_an_article_are_written_as_the_names_are():
    names = {row[5] for row in rows("train") if row[0] == "name" and row[1] == "en"}
    assert len(BARE_NAMES) > 100 and BARE_NAMES <= names


def test_names_that_might_fit_both_things_are_not_set_against_each_other():
    animals = {"group": 3, "subgroup": "animal-mammal"}
    assert confusable(concept("dog", "狗", **animals), concept("dog face", "狗脸", **animals))
    assert confusable(concept("poodle", "贵宾犬", **animals), concept("dog", "狗", **animals))
    assert not confusable(concept("cat", "猫", **animals), concept("fox", "狐狸", **animals))
    assert confusable(concept("bird", "鸟", 3, "animal-bird"), concept("parrot", "鹦鹉", 3, "animal-bird"))
    woman, princess = concept("woman", "女人", 1, "person"), concept("princess", "公主", 1, "person-role")
    assert confusable(woman, princess)


def save_font(path: Path, codes: list[int]) -> None:
    """Write a font with bars of different lengths as glyphs of the given code points."""
    builder, names = FontBuilder(1000), [f"glyph{code}" for code in codes]
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap(dict(zip(codes, names)))
    glyphs = {}
    for i, name in enumerate([".notdef", *names]):
        pen = TTGlyphPen(None)
        for number, point in enumerate([(50, -100), (50, 600), (300 + 10 * i, 600), (300 + 10 * i, -100)]):
            (pen.lineTo if number else pen.moveTo)(point)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (1000, 0) for name in glyphs})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)


def make_packages(folder: Path) -> Path:
    """Write packages of forty concepts, drawn as coloured shapes, in the formats of the real packages."""
    modules, names = folder / "node_modules", [f"{a}{b}" for a in "bdfgklmp" for b in ("an", "et", "il", "op", "um")]
    codes = {name: f"1F{i:03X}" for i, name in enumerate(names, 0x300)}

    def save(path: str, value) -> None:
        (modules / path).parent.mkdir(parents=True, exist_ok=True)
        (modules / path).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")

    for package, version in sources.PACKAGES.items():
        save(f"{package}/package.json", {"version": version})
    icon_sets = [source for source, match, _ in sources.STYLES.values() if match not in ("files", "font")]
    for turn, package in enumerate(icon_sets):
        icons = {}
        for i, name in enumerate(names):
            fill, radius = f"#{(i * 5003 + turn * 71) % 4096:03x}", 4 + i % 9
            icons[name] = {"body": f'<rect x="2" y="3" width="{20 + i % 8}" height="24" rx="{radius}" fill="{fill}"/>'}
        save(f"{package}/icons.json", {"icons": icons, "width": 32, "height": 32})
        save(f"{package}/chars.json", {codes[name].lower(): name for name in names})
    for font in [source for source, match, _ in sources.STYLES.values() if match == "font"]:
        save_font(modules / font, [int(code, 16) for code in codes.values()])
    (modules / "@lobehub/fluent-emoji-3d/assets").mkdir(parents=True)
    for i, name in enumerate(names):
        picture = Image.new("RGBA", (60, 40 + i), (i * 6, 250 - i * 5, 90, 255))
        picture.save(modules / f"@lobehub/fluent-emoji-3d/assets/{codes[name].lower()}.webp", lossless=True)
    for language in ("en", "zh"):
        short = names if language == "en" else [chr(0x4E00 + i) for i in range(len(names))]
        tts = {chr(int(codes[name], 16)): {"tts": [label]} for name, label in zip(names, short)}
        save(f"cldr-annotations-full/annotations/{language}/annotations.json", {"annotations": {"annotations": tts}})
    groups = list(CATEGORIES)
    entries = [
        {"hexcode": code, "emoji": chr(int(code, 16)), "group": groups[i // 5], "subgroup": i}
        for i, code in enumerate(codes.values())
    ]
    save("emojibase-data/en/data.json", entries)
    save("emojibase-data/meta/groups.json", {"subgroups": {str(i): f"s{i}" for i in range(len(names))}})
    save("emojibase-data/meta/unicode-names.json", {})
    return folder


def test_builder_writes_the_same_bytes_for_the_same_seed(tmp_path, monkeypatch):
    packages = make_packages(tmp_path / "packages")
    names = [f"{start}{end}" for start in "bd" for end in ("an", "et", "il", "op", "um")]
    monkeypatch.setattr(prepare, "DEMO", frozenset(names[:5]))
    photo = Image.radial_gradient("L").convert("RGB")
    monkeypatch.setattr(prepare, "load_photos", lambda folder: [(name, photo, "nobody; CC0-1.0; x") for name in names])

    def build(output: str, seed: int) -> dict[str, bytes]:
        folders = ["--packages", packages, "--output", tmp_path / output]
        arguments = [*folders, "--seed", seed, "--eval-scenes", 6]
        prepare.build(prepare.parse_args([str(argument) for argument in arguments]))
        return {path.name: path.read_bytes() for path in (tmp_path / output).iterdir()}

    first, again, other = build("first", 0), build("again", 0), build("other", 1)
    assert first == again
    assert first.keys() == {f"{name}.parquet" for name in (*FILES, *ALSO)} | {"concepts.json"}
    assert all(first[name] != other[name] for name in first.keys() - {"drawings.parquet"})
    shown = pq.read_table(tmp_path / "first/test_compositions.parquet")["concept"].to_pylist()
    _, held_out = load_concept_table(tmp_path / "first/concepts.json")
    assert {c for row in shown for c in row.split(",")} <= {concept.slug for concept in held_out}
    assert set(pq.read_table(tmp_path / "first/drawings.parquet")["style"].to_pylist()) == set(TRAIN_STYLES)


def test_a_package_of_another_version_is_refused(tmp_path):
    packages = make_packages(tmp_path)
    (packages / "node_modules/@iconify-json/noto/package.json").write_text('{"version": "0.1"}')
    with pytest.raises(SystemExit, match="0.1, 1.2.9 is pinned"):
        sources.find_packages(packages)
