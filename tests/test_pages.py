"""Contact sheets: Chinese is drawn and wrapped on any machine, and right is told from wrong without colour."""

import html
import re

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageChops, ImageFont

import minivlm.evaluation.contact_sheet as sheets
from helpers.data import png
from helpers.models import ROOT
from minivlm.evaluation.contact_sheet import answers_page, contact_sheet, font_for, fonts, has, wrap
from minivlm.resources import FONT
from tools.subset_font import characters

LONG = "蓝色背景上有五个东西，右上是鼓掌，左边是鼓掌，右边是野猪，下方是挥手，右下是鼓掌。" * 3


def item(question="这是什么？", answer="猫脸", language="zh") -> dict:
    return {"images": [png()], "question": question, "answer": answer, "language": language}


@pytest.fixture
def no_chinese_font(monkeypatch):
    """A machine that has no font with Chinese in it."""
    monkeypatch.setattr(sheets, "INSTALLED", ())
    fonts.cache_clear()
    yield
    fonts.cache_clear()


def test_the_font_has_every_character_of_the_data():
    wanted = characters(ROOT / "data")
    assert {"猫", "，", "✓", "é"} <= wanted and len(wanted) > 1000
    font = ImageFont.truetype(FONT, 14)
    assert [c for c in sorted(wanted) if not has(font, c)] == []
    assert not has(font, "龘") and not has(font, "a龘")


def test_the_font_is_small_and_under_its_licence():
    assert FONT.stat().st_size < 450_000
    assert ImageFont.truetype(FONT).getname() == ("MiniVLM Sans", "Regular")  # not the reserved name
    licence = FONT.with_name("OFL.txt").read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence and "Reserved Font Name 'Source'" in licence
    assert FONT.relative_to(ROOT).as_posix() in (ROOT / "NOTICE").read_text(encoding="utf-8")


def test_chinese_is_drawn_and_not_boxes(no_chinese_font):
    cat, dog = (contact_sheet([item(question=text)], [text]) for text in ("这是猫吗？", "这是狗吗？"))
    assert ImageChops.difference(cat, dog).getbbox(), "two words look alike, as boxes do"


def test_another_font_is_taken_for_what_ours_lacks(monkeypatch):
    other = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", 14)
    own = ImageFont.truetype(FONT, 14)
    monkeypatch.setattr(sheets, "fonts", lambda size: [own, other])
    assert font_for("猫 cat", 14) is own and font_for("Кот", 14) is other
    assert font_for("Кот 猫", 14) is own, "no font has both"


@pytest.mark.parametrize("text", [LONG, "word " * 90, "w" * 200])
def test_no_text_leaves_its_cell(text, no_chinese_font):
    sheet = contact_sheet([item(text, text), item()], [text, "猫脸"], columns=2, cell=(260, 288))
    empty = contact_sheet([item("", ""), item()], ["", "猫脸"], columns=2, cell=(260, 288))
    left, top, right, bottom = ImageChops.difference(sheet, empty).getbbox()
    assert left >= 8 and top > 128 and 200 < right <= 256 and bottom < 288


@settings(deadline=None)
@given(st.text("a bc猫，。（\n", max_size=60) | st.just(LONG), st.integers(60, 300))
def test_a_wrapped_text_is_whole_and_no_line_is_too_long(text, width):
    font = ImageFont.truetype(FONT, 14)
    lines = wrap(text, font, width, most=1000)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(font.getlength(line.rstrip()) <= width for line in lines)
    cut = wrap(text, font, width, most=2)
    assert len(cut) <= 2 and all(font.getlength(line.rstrip()) <= width for line in cut)
    assert (len(lines) > 2) == cut[-1].endswith("…")


def test_an_answer_of_an_untrained_model_is_drawn_whatever_it_holds():
    said = "a\nb\r\x1c\x1d\x1e\x85\u2029\u202e\ufffd" + "\x00\x7f"
    assert contact_sheet([item()], [said]).getbbox()


def test_lines_break_as_both_languages_do():
    font = ImageFont.truetype(FONT, 14)
    assert wrap("two words", font, 50, most=9) == ["two ", "words"]
    lines = wrap(LONG, font, 200, most=99)
    assert len(lines) > 5 and not any(line[0] in "，。" for line in lines)


def test_the_page_marks_right_and_wrong_by_sign_and_word():
    items = [item(), item("<b>What?</b>", "a dog & co", "en"), item("Which?", "cat", '"><script>')]
    page = answers_page("Sheet", items, ["猫脸。", "a cat", "<cat>"])
    body = page.split("</head>")[1]
    assert [html.unescape(re.sub("<.*?>", "", p)) for p in re.findall('<p class="answer">(.*?)</p>', body)] == [
        "✓ right: 猫脸。", "✗ wrong: a cat", "✗ wrong: <cat>"]  # fmt: skip
    assert "1 of 3 answers are right" in body and "<b>What?" not in body and "<script>" not in body
    assert body.count('src="data:image/jpeg;base64,') == 3 and not re.search(r'(src|href)="(?!data:)', page)
    assert "prefers-color-scheme: dark" in page and "@font-face" in page
    assert "@font-face" not in answers_page("Sheet", items[1:], ["a cat", "a cat"]), "half a megabyte for nothing"
