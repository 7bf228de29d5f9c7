"""How answers are scored: places, captions, ranked answers, and what the tables and cards say of them."""

import json

import pyarrow.parquet as pq
import pytest

from helpers.data import row, write
from helpers.models import ROOT, make_model, make_processor
from minivlm.commands.evaluate import main
from minivlm.data.rows import load_rows
from minivlm.evaluation.captions import content_words, mean_cell, word_f1
from minivlm.evaluation.contact_sheet import answers_page
from minivlm.evaluation.grounding import iou, is_in_place, read_numbers
from minivlm.evaluation.scoring import add_options, is_right, print_table, prompts, result_of, summarise
from minivlm.hub.card import results
from minivlm.hub.results import eval_results
from minivlm.reading import answer, option_scores
from tools.card import own_entries

BOX = [10, 10, 30, 30]


@pytest.fixture(scope="module")
def model():
    return make_model(text={"vocab_size": 6400})


def item(task, answer, **more) -> dict:
    """Return an item as `prompts` makes it."""
    return {"row": 0, "task": task, "language": "en", "question": "?", "answer": answer, "options": None, **more}


def result(task, answer, output, **more) -> dict:
    return result_of(item(task, answer, **more), output, (1.0, 1), None)


def captions(name) -> dict[str, list[str]]:
    """Return the captions of a file of the embedded data, by language."""
    table = pq.read_table(ROOT / "data" / f"{name}.parquet", columns=["task", "language", "conversations"])
    found = {"en": [], "zh": []}
    for task, language, turns in zip(*(table[name].to_pylist() for name in table.column_names)):
        if task == "caption":
            found[language].append(json.loads(turns)[-1]["content"])
    return found


def test_iou_and_what_counts_as_an_answer():
    box = tuple(BOX)
    assert iou(box, box) == 1 and iou(box, (40, 40, 60, 60)) == 0
    assert iou(box, (10, 10, 20, 30)) == pytest.approx(0.5) and iou(box, (20, 20, 40, 40)) == pytest.approx(1 / 7)
    assert is_in_place("box", "10,10,20,30", box) and not is_in_place("box", "10,10,19,30", box)
    assert is_in_place("point", "30,10", box) and not is_in_place("point", "31,10", box)
    assert read_numbers("12, 40,55 ,88", 4) == (12, 40, 55, 88)
    for text in ("12,40,55", "12,40,55,101", "12,40,55,8.5", "12,40,55,88 or so", "-1,2,3,4", ""):
        assert read_numbers(text, 4) is None


def test_only_points_and_boxes_with_a_true_box_are_right_by_their_place():
    assert is_right(item("point", "20,20", box=BOX), "12,28") and is_right(
        item("box", "10,10,30,30", box=BOX), "10,10,29,29"
    )
    assert not is_right(item("point", "20,20", box=BOX), "31,20")
    for task, box in (("point", None), ("box", None), ("name", BOX)):
        assert is_right(item(task, "20,20", box=box), " 20,20.") and not is_right(
            item(task, "20,20", box=box), "12,28"
        )
    assert is_right({"answer": "Red"}, "red."), "an item that a caller makes has no box"


def test_places_count_in_the_overall_share_and_captions_do_not():
    found = [result("point", "20,20", "12,28", box=BOX), result("point", "20,20", "90,28", box=BOX)]
    found += [result("name", "cat", "cat"), result("caption", "A cat.", "A dog.")]
    metrics = summarise(found)
    assert metrics["tasks"]["point"]["en"]["hits"] == 1
    assert (metrics["overall"]["hits"], metrics["overall"]["count"]) == (2, 3)
    assert metrics["rules"] == {"point": "point in box"} and metrics["scores"]["words"] == 0
    assert summarise(found[2:])["rules"] == {}


def test_the_page_of_answers_shows_a_place_as_right():
    items = [item("point", "20,20", box=BOX, images=[]), item("point", "20,20", box=BOX, images=[])]
    page = answers_page("Sheet", items, ["12,28", "90,90"])
    assert "1 of 2 answers are right" in page


@pytest.mark.parametrize(
    ("box", "answer", "message"),
    [
        ([10, 10, 300, 200], "20,20", "not left, top, right and bottom in per cent"),
        ([30, 10, 10, 30], "20,20", "not left, top, right and bottom in per cent"),
        (BOX, "50,50", "'50,50' is wrong by the row's own box .10, 10, 30, 30."),
    ],
)
def test_a_box_that_contradicts_its_answer_is_refused(tmp_path, box, answer, message):
    data = write(tmp_path / "rows.parquet", [row(answer=answer) | {"task": "point", "box": box}])
    with pytest.raises(ValueError, match=f"row 0: .*{message}"):
        prompts(load_rows([data]), make_processor())


def test_the_stored_places_are_right_by_their_boxes():
    rows = load_rows([str(ROOT / "data" / "dev_grounding.parquet")])
    items = [item for item in prompts(rows, make_processor()) if item["box"]]
    assert len(items) == 240 and all(is_right(item, item["answer"]) for item in items)
    others = [is_right(item, items[i - 1]["answer"]) for i, item in enumerate(items)]
    assert sum(others) < 60, "the answer to another picture is rarely right"


def test_content_words_are_those_that_say_what_is_in_the_picture():
    english = content_words("A man's shoe (top left) on the green background, and 2 things: zipper-mouth face.")
    assert english == dict.fromkeys(["man's", "shoe", "top", "left", "green", "2", "zipper", "mouth", "face"], 1)
    assert content_words("红色背景上的上弦月。") == {"红色": 1, "上弦": 1, "弦月": 1}
    assert content_words("蓝色背景上有2个东西：右上是鸟，左边是鸟。") == {
        "蓝色": 1,
        "2": 1,
        "右上": 1,
        "鸟": 2,
        "左边": 1,
    }
    assert not content_words("The thing is on a background.") and not content_words("背景上有东西。")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_caption_loses_by_words_missing_wrong_and_too_many(language):
    for text in captions("dev")[language][:60]:
        words = list(content_words(text).elements())
        assert word_f1(text, text) == word_f1(text.upper().rstrip(".。"), text) == 1
        fewer, more = words[:-1], [*words, "水瓶" if language == "zh" else "aquarius"]
        joined = ["，".join(part) for part in (words, reversed(words), fewer, more, [*words, *words])]
        same, turned, missing, added, twice = (word_f1(part, text) for part in joined)
        assert same == turned == 1 and missing < 1 and added < 1, text
        assert missing == pytest.approx(2 * len(fewer) / (len(fewer) + len(words)))
        assert twice == pytest.approx(2 / 3), "words said twice are words too many"
        assert word_f1("", text) == word_f1("???", text) == 0


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_caption_of_another_picture_gets_little(language):
    texts = captions("dev")[language]
    others = [word_f1(texts[i - 1], text) for i, text in enumerate(texts)]
    assert 0 < sum(others) / len(others) < 0.25


def test_the_mean_has_the_interval_of_its_spread():
    assert mean_cell([0.0, 1.0] * 50) == {"match": 0.5, "count": 100, "low": 0.4015, "high": 0.5985}
    assert mean_cell([0.5] * 9)["low"] == 0.5 and mean_cell([0.1, 0.0, 0.9])["low"] == 0
    alone = mean_cell([0.7])
    assert (alone["low"], alone["high"]) == (0, 1), "one answer says nothing about the spread"


def test_ranking_among_answers_is_ranking_options_that_are_these_answers(tmp_path, model):
    names = {"en": ["cat", "dog", "red bus"], "zh": ["家", "狗", "猫"]}
    rows = []
    for i in range(8):
        language = "zh" if i % 2 else "en"
        rows.append(row(answer=names[language][i // 2 % 3], seed=i) | {"task": "name", "language": language})
    own = row(answer="no", seed=20) | {"task": "name", "language": "en", "options": ["no", "yes"]}
    other = row(answer="3", seed=21) | {"task": "count", "language": "en", "options": None}
    plain = [own, other, *[r | {"options": None} for r in rows]]
    given = [
        own,
        other,
        *[r | {"options": sorted({*names[r["language"]], *(["no"] * (r["language"] == "en"))})} for r in rows],
    ]
    paths = [write(tmp_path / f"{i}.parquet", part) for i, part in enumerate((plain, given))]
    plain, given = (prompts(load_rows([path]), make_processor()) for path in paths)
    with pytest.raises(ValueError, match="--among nme: .* Tasks are count, name."):
        add_options(plain, ["nme"])
    add_options(plain, ["name"])
    assert [item["options"] for item in plain] == [item["options"] for item in given]
    offered = [item for item in plain if item["options"]]
    assert offered[0]["options"] == ["no", "yes"] and len(offered) == 9
    alone = [scores for item in offered for scores in option_scores(model, make_processor(), [item])]
    together = option_scores(model, make_processor(), offered)
    assert all(values == pytest.approx(wanted, abs=1e-4) for values, wanted in zip(together, alone, strict=True))
    assert len({item["options"][values.index(max(values))] for item, values in zip(offered, together)}) > 1


@pytest.mark.parametrize(
    "other", [[], [row(question="Hi?", answer="a cat", images=0)], [row(answer="a cat", images=2, seed=1)]]
)
def test_questions_about_one_picture_are_scored_and_answered_as_alone(other, tmp_path, model):
    """What they begin with is read once, unless a prompt of the batch has no picture, or more."""
    words = ("What?", "What is to the left of the red house?", "How many are there? Answer with a number.")
    rows = [row(question=text, answer="a cat", seed=seed) for seed in (1, 2) for text in words]
    rows = [one | {"options": ["a cat", "two", "something else"]} for one in [*rows, *other]]
    items = prompts(load_rows([write(tmp_path / "rows.parquet", rows)]), make_processor())
    read, language_model = [], model.model.language_model
    hook = language_model.register_forward_pre_hook(
        lambda _, a, k: read.append(k["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    scores = option_scores(model, make_processor(), items)
    hook.remove()
    outputs = answer(model, make_processor(), items, 8)
    assert read[0][0] == (len(items) if other else 2) and read[1][0] == len(items)
    for one, values, output in zip(items, scores, outputs, strict=True):
        assert values == pytest.approx(option_scores(model, make_processor(), [one])[0], abs=1e-4)
        assert output == answer(model, make_processor(), [one], 8)[0]


def test_the_tower_sees_a_picture_once_for_all_options(tmp_path, model):
    rows = [row(answer="a", images=2, seed=i) | {"options": [*"abcdefgh"]} for i in range(0, 6, 2)]
    items = prompts(load_rows([write(tmp_path / "rows.parquet", rows)]), make_processor())
    seen = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    scores = option_scores(model, make_processor(), items)
    hook.remove()
    assert sum(seen) == 6 and all(len(values) == 8 for values in scores)


def test_the_command_writes_and_prints_each_kind_of_score(tmp_path, model, capsys):
    model.save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    rows = [
        row(answer="20,20", seed=1) | {"task": "point", "box": BOX},
        row(answer="A cat.", seed=2) | {"task": "caption"},
    ]
    rows += [row(answer=name, seed=3) | {"task": "name"} for name in ("cat", "dog")]
    rows = [{"box": None} | r | {"language": "en"} for r in rows]
    data = write(tmp_path / "rows.parquet", rows)
    options = ["--json", str(tmp_path / "scores.json"), "--among", "name"]
    main([str(tmp_path / "model"), "--data", data, "--device", "cpu", *options])
    out = capsys.readouterr().out
    assert "point is right by: point in box" in out and "content words" in out and "options" in out
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["overall"]["count"] == 3 and scores["among"] == ["name"]
    assert scores["ranked"]["name"]["en"]["options"] == scores["ranked"]["name"]["en"]["count"] == 2
    assert scores["words"]["caption"]["en"]["count"] == 1


def test_cards_tell_the_kinds_of_scores_apart(capsys):
    found = [result("point", "20,20", "12,28", box=BOX), result("name", "cat", "cat")]
    metrics = summarise([*found, result("caption", "A red cat.", "A red dog."), result("caption", "A cat.", "A cat.")])
    index = {(r.dataset_config, r.metric_type): r for r in eval_results(metrics, ["x"])}
    assert index["point-en", "accuracy"].metric_name.startswith("Point in box (1 of 1, ")
    assert index["caption-en", "f1"].metric_name.startswith("Content words (mean of 2, ")
    assert index["caption-en", "f1"].metric_value == 0.75 and index["name-en", "exact_match"].metric_value == 1
    ids = [entry["dataset"]["task_id"] for entry in own_entries(metrics)]
    assert len(set(ids)) == len(ids) and {"point-en", "caption-en", "caption-en-words"} < set(ids)
    text = results(metrics)
    assert "| point (point in box) | en | 100.0% | 1 of 1 |" in text and "| caption | en | 75.0% | mean of 2 |" in text
    old = {key: metrics[key] for key in ("overall", "tasks", "ranked")}
    assert len(eval_results(old, ["x"])) == len(index) - 1 and "exact match" in results(old)
    print_table(summarise(found[1:]))
    assert "exact match" in capsys.readouterr().out.splitlines()[0]
