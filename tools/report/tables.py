"""Write results as tables in Markdown: six rows for the README files, and a page of everything."""

import re

from minivlm.evaluation.scoring import cell
from minivlm.hub.results import cells, evidence
from tools.report.measure import FILES

SCENES = ("count", "count_kind", "exists", "where", "left_of", "background")
SHORT = 6  # rows of the table in the README files: the first of these that were measured
ROWS = (  # title in English and Chinese, file, key of the metrics, tasks
    ("name of the thing", "名称", "test", "tasks", ("name",)),
    ("which of four names", "四选一", "test", "tasks", ("choice",)),
    ("yes or no", "是或否", "test", "tasks", ("yes_no",)),
    (
        "scenes: count, exists, where, left of, background",
        "场景：数量、有无、位置、左边、背景",
        "test",
        "tasks",
        SCENES,
    ),
    ("point to a thing in a scene", "指出场景中的位置", "test_grounding", "tasks", ("point",)),
    ("thing in a photograph, among 36 names", "照片中的物品，36 个名称中选", "test_photos", "ranked", ("name",)),
    ("category", "类别", "test", "tasks", ("category",)),
    ("which of four names, the likeliest", "四选一，可能性最大的", "test", "ranked", ("choice",)),
)
HEADS = (
    "| question | English | 95 % interval | Chinese | 95 % interval | rows |",
    "| 问题 | 英文 | 95 % 区间 | 中文 | 95 % 区间 | 行数 |",
)
BEGIN, END = "<!-- results: written by `python -m tools.release` -->", "<!-- end of results -->"


def of_file(results: dict, name: str) -> dict:
    """Return the metrics of one evaluation file in the content of data/results.json; empty if it has none."""
    return results if name == "test" else results.get("files", {}).get(name, {})


def pooled(metrics: dict, key: str, tasks: tuple[str, ...], language: str) -> dict | None:
    """Return the cell of all answers to these tasks in a language; None if one of the tasks was not measured."""
    found = [metrics.get(key, {}).get(task, {}).get(language) for task in tasks]
    if None in found:
        return None
    hits, count = sum(c["hits"] for c in found), sum(c["count"] for c in found)
    return cell([True] * hits + [False] * (count - hits))


def short_table(results: dict, chinese: bool = False) -> str:
    """Return the table for README.md, or for README_zh.md."""
    lines = []
    for english, translated, file, key, tasks in ROWS:
        en, zh = (pooled(of_file(results, file), key, tasks, language) for language in ("en", "zh"))
        if en and zh:
            shares = [f"{c['match']:.1%} | {c['low']:.1%} - {c['high']:.1%}" for c in (en, zh)]
            title = translated if chinese else english
            lines.append(f"| {title} | {' | '.join(shares)} | {en['count']:,} + {zh['count']:,} |")
    return "\n".join([HEADS[chinese], "|---|---|---|---|---|---|", *lines[:SHORT]])


def put_table(text: str, table: str) -> str:
    """Return the text of a document with `table` between its two markers.

    Raises:
        ValueError: the document does not have both markers, once each and in order.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the markers {BEGIN} and {END} must stand around the table, once. Put them back.")
    return pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text)


def full_page(results: dict) -> str:
    """Return docs/results.md: a table of every file, by task and language, with 95 % confidence intervals."""
    parts = [
        "# Results",
        "Written by `python -m tools.docs`, from the answers of one model to every row of each file, greedy decoding.",
        f"Weights (SHA-256 of model.safetensors): `{results['weights_sha256']}`. Device: {results['device']}.",
        "An answer is right if it equals the reference, apart from blanks, a closing full stop, and upper and lower "
        "case. Rows with another title say their rule. `data/README.md` has the tasks and the floors of a guess.",
    ]
    for name, description in FILES.items():
        metrics = of_file(results, name)
        if metrics:
            limit = f" The first {results['limit']} rows." if results.get("limit") else ""
            parts += [f"## data/{name}.parquet", f"{description[0].upper()}{description[1:]}.{limit}", table(metrics)]
    return "\n\n".join(parts) + "\n"


def table(metrics: dict) -> str:
    """Return the table of one file: the overall share first, then each task and language."""
    lines = ["| task | language | counted as right | share | 95 % interval | right |", "|---|---|---|---|---|---|"]
    for _, title, part, c in cells(metrics):
        task, _, language = part.rpartition("-")
        interval, counts = f"{c['low']:.1%} - {c['high']:.1%}", evidence(c).split(", 95 %")[0]
        name = task or "overall, without captions"
        lines.append(f"| {name} | {language} | {title.lower()} | {c['match']:.1%} | {interval} | {counts} |")
    return "\n".join(lines)


def cost(record: dict) -> str:
    """Return the section that says what a training run took, by its run.json."""
    options, seconds = record["options"], max(record["seconds"], 1e-3)
    start = f"from the model {options['model']}" if options.get("model") else "from new weights"
    lines = [
        f"| started | {start}, commit {record['commit'] or 'not known'} |",
        f"| time | {seconds / 60:,.1f} min |",
        f"| optimizer steps | {record['steps']:,} |",
        f"| questions | {record['rows']:,} ({record['rows'] / seconds:,.1f} per second) |",
        f"| tokens, with padding | {record['tokens']:,} ({record['tokens'] / seconds:,.0f} per second) |",
        f"| device | {record['device']}, {record['processes']} process(es), {record['precision']} |",
        "| energy | not measured |",
    ]
    return "\n".join(["## What the run took", "", "| | |", "|---|---|", *lines])
