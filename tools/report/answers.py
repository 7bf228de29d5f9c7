"""Put the rows of the evaluation files beside the answers of a model, and choose some of them to be drawn."""

import json
from pathlib import Path

from PIL import Image

from minivlm.data.rows import Rows, load_rows
from minivlm.evaluation.contact_sheet import contact_sheet
from minivlm.evaluation.scoring import normalise, prompts
from tools.emoji.concepts import CATEGORIES
from tools.report.attention import attention_sheet
from tools.report.measure import read_answers

COLUMNS = ("task", "language", "style", "concept")
SHEETS = {"test": "", "test_grounding": "", "test_photos": "photo_"}  # file -> what precedes the name of the task
COLORS = 128  # of a contact sheet's palette; a sheet of drawings then takes about 100 kB


def read_rows(results: Path, root: Path, names: list[str]) -> tuple[dict[str, Rows], list[dict]]:
    """Return the rows of each file, and all answers with the columns of their rows, `file` and `right`."""
    tables, answers = {}, []
    for name in names:
        tables[name] = rows = load_rows([str(root / "data" / f"{name}.parquet")])
        columns = {column: rows[column] for column in COLUMNS}
        for entry in read_answers(results / f"{name}.jsonl"):
            values = {column: values[entry["row"]] for column, values in columns.items()}
            right = normalise(entry["output"]) == normalise(entry["answer"])
            answers.append(entry | values | {"file": name, "right": right})
    return tables, answers


def add_categories(answers: list[dict], root: Path) -> None:
    """Give each answer about one thing the English name of its category."""
    concepts = json.loads((root / "data" / "concepts.json").read_text(encoding="utf-8"))
    categories = {concept["slug"]: CATEGORIES[concept["group"]][0] for concept in concepts}
    for entry in answers:
        if entry["concept"] in categories:
            entry["category"] = categories[entry["concept"]]


def contact_sheets(tables: dict[str, Rows], answers: list[dict], processor, count: int) -> dict[str, Image.Image]:
    """Return a contact sheet of each task, by its name, with the first `count` answers to it."""
    chosen: dict[str, list[dict]] = {}
    for entry in answers:
        if entry["file"] in SHEETS:
            entries = chosen.setdefault(SHEETS[entry["file"]] + entry["task"], [])
            if len(entries) < count:
                entries.append(entry)
    sheets = {}
    for name, entries in chosen.items():
        items = prompts(tables[entries[0]["file"]].select([entry["row"] for entry in entries]), processor)
        sheet = contact_sheet(items, [entry["output"] for entry in entries])
        sheets[name] = sheet.quantize(COLORS, dither=Image.Dither.NONE)
    return sheets


def attention_of(tables: dict[str, Rows], answers: list[dict], model, processor, count: int = 3) -> Image.Image | None:
    """Draw the attention for `count` pictures whose names were asked for in English, right answers first."""
    asked = [a for a in answers if (a["file"], a["task"], a["language"]) == ("test", "name", "en")]
    chosen = sorted(asked, key=lambda entry: not entry["right"])[:count]
    if not chosen:
        return None
    return attention_sheet(model, processor, prompts(tables["test"].select([a["row"] for a in chosen]), processor))
