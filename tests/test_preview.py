"""The preview tells what training would see: what is counted, what is left out, and which words carry loss."""

import html
import re

import pytest

from helpers.data import png, row, write
from minivlm.commands import preview
from minivlm.data.rows import load_rows


def test_the_preview_shows_what_training_sees(tmp_path, capsys):
    rows = [row(f"<script>{i}</script>?", answer, seed=i) for i, answer in enumerate(["a dog & co", "一只猫", "42"])]
    rows += [row("No picture", "Nothing.", images=0), {**row("q", "a"), "image_bytes": [png()[:40]]}]
    source, page = write(tmp_path / "a.parquet", rows), tmp_path / "new folder" / "page.html"
    preview.main([source, "--output", str(page), "--pack_tokens", "1024"])
    table = " ".join(capsys.readouterr().out.split())
    assert "rows 5 of 5 left out 1 (20.00%) 1 x unreadable picture" in table and f"{source}, row 4" in table
    assert "pictures per row 0 to 1, median 1" in table and "picture widths 32 to 32" in table
    assert "answers are in Latin 50.0%, Chinese 25.0%, no letters 25.0%" in table
    assert "packing 1 packs of 1,024 tokens" in table
    text = page.read_text()
    said = [html.unescape(words) for words in re.findall(r"<mark>(.*?)</mark>", text.split("</p>", 1)[1])]
    assert said == [f"{answer}<|im_end|>" for answer in ("a dog & co", "一只猫", "42", "Nothing.")]
    assert "<script>" not in text and text.count("<img ") == 3 and text.count("64 image tokens") == 3
    assert text.count("<article>") == 5 and text.count("left out: unreadable picture") == 1


def test_a_sample_is_drawn_and_the_longest_rows_are_cut_or_counted(tmp_path, capsys):
    texts = [{"user": f"{i}", "assistant": "word " * 20} for i in range(8)]
    source = write(tmp_path / "a.parquet", [{"images": [], "texts": texts}] * 30)
    options = [source, "--rows", "7", "--max_length", "60", "--output", str(tmp_path / "p.html"), "--shown", "2"]
    preview.main(options)
    assert "7 of 30" in (out := capsys.readouterr().out) and "7 x too long" in out
    preview.main([*options, "--too_long", "cut"])
    assert "cut at a turn      7" in capsys.readouterr().out and len(load_rows([source])) == 30
    assert (tmp_path / "p.html").read_text().count("<article>") == 2


def test_the_preview_looks_at_the_rows_that_the_filters_leave(tmp_path, capsys):
    rows = [row(seed=i) | {"task": "ab"[i % 2]} for i in range(6)]
    options = [write(tmp_path / "a.parquet", rows), "--output", str(tmp_path / "p.html")]
    preview.main([*options, "--filter", '{"task": ["a"]}'])
    assert "rows               3 of 3" in capsys.readouterr().out
    with pytest.raises(ValueError, match="filter: no column 'tasks'. The data has conversations"):
        preview.main([*options, "--filter", '{"tasks": ["a"]}'])
