"""Score the answers of a model to the rows of a data set, per task and language, with confidence intervals."""

import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from tqdm.auto import tqdm
from transformers import ProcessorMixin

from minivlm.data.bad_rows import BadRow
from minivlm.data.rows import Rows
from minivlm.evaluation.captions import mean_cell, word_f1
from minivlm.evaluation.grounding import RULES, check_box, is_in_place
from minivlm.reading import ANSWER_TOKENS, Reading, same_picture

GENERATIVE = ("caption",)  # free text: exact match says little, so these stay out of the overall figure
CAPTION_TOKENS = 128  # longest caption of a model; 64 would cut some of the embedded data, which have up to 75


def normalise(text: str) -> str:
    """Return an answer without surrounding blanks, a closing full stop and the difference of upper and lower case."""
    return unicodedata.normalize("NFKC", text).strip().rstrip(".。").strip().casefold()


def is_place(item: dict) -> bool:
    """Return whether the answer to an item is a place that its `box` decides about."""
    return item.get("box") is not None and item["task"] in RULES


def is_right(item: dict, output: str) -> bool:
    """Return whether an answer to an item of `prompts` is right: the only place that decides it.

    For a `point` or `box` with a true box the place decides. All others match the reference, up to `normalise`;
    captions also get `word_f1`, which is no yes or no.
    """
    if is_place(item):
        return is_in_place(item["task"], output, item["box"])
    return normalise(output) == normalise(item["answer"])


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def prompts(rows: Rows, processor: ProcessorMixin) -> list[dict]:
    """Return one item per row: prompt, pictures and reference; the question is every turn before the last.

    Raises:
        ValueError: a row cannot be read, has no answer at its end, or one that its options or its box contradict.
    """
    prepared = []
    for index in range(len(rows)):
        try:
            row, sample = rows[index], rows.sample(index)
        except BadRow as error:
            raise ValueError(f"{rows.where(index)}: {error}. Evaluation counts every row, so mend it.") from error
        *question, answer = sample["messages"]
        if answer["role"] != "assistant":
            raise ValueError(f"Row {index} does not end with an assistant turn, so there is nothing to compare with.")
        words, options = "".join(part["text"] for part in answer["content"]), row.get("options")
        if options and words not in options:
            raise ValueError(f"{rows.where(index)}: the answer {words!r} is none of its options {options}. Add it.")
        prepared.append(
            {
                "row": index,
                "question": "".join(part.get("text", "") for part in question[-1]["content"]).strip(),
                "text": processor.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True),
                "images": sample["images"],
                "answer": words,
                "task": row.get("task", "all"),
                "language": row.get("language", "all"),
                "options": options,
                "box": row.get("box"),
            }
        )
        if is_place(prepared[-1]):
            try:
                check_box(prepared[-1]["task"], words, row["box"])
            except ValueError as error:
                raise ValueError(f"{rows.where(index)}: {error}") from error
    return prepared


def add_options(items: list[dict], tasks: Sequence[str]) -> None:
    """Give the items of these tasks that have no options all answers of their task and language as options.

    Raises:
        ValueError: no item has such a task.
    """
    answers = defaultdict(set)
    for item in items:
        answers[item["task"], item["language"]].add(item["answer"])
    known = sorted({task for task, _ in answers})
    for task in tasks:
        if task not in known:
            raise ValueError(f"--among {task}: none of these rows has this task. Tasks are {', '.join(known)}.")
    for item in items:
        if item["task"] in tasks and not item["options"]:
            item["options"] = sorted(answers[item["task"], item["language"]])


def evaluate(
    model, processor, rows: Rows, limit: int | None = None, batch_size: int = 64, among: Sequence[str] = ()
) -> dict:
    """Return the metrics of the first `limit` rows, as `summarise` does; for `among` see `score_rows`."""
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    return summarise(score_rows(model, processor, rows, batch_size, among=among))


def score_rows(
    model, processor, rows: Rows, batch_size: int = 64, quiet: bool = False, among: Sequence[str] = ()
) -> list[dict]:
    """Answer every row; return one result per row, as `result_of` does.

    Args:
        among: tasks whose rows also rank all answers of their task and language, as if these were their options.
    """
    was_training = model.training
    model.eval()
    items = prompts(rows, processor)
    add_options(items, among)

    bar = tqdm(total=len(items), desc="answering", unit="row", disable=quiet)
    results = {}
    with bar:
        for batch in in_batches(items, batch_size):
            results |= zip(batch, score_batch(model, processor, [items[i] for i in batch]))
            bar.update(len(batch))
    model.train(was_training)
    return [results[i] for i in range(len(items))]


def in_batches(items: list[dict], size: int) -> Iterator[list[int]]:
    """Yield the places of the items in batches; captions, whose answers are long, stand in batches of their own.

    Items about the same picture stand beside each other, since a batch sees each of its pictures once.
    """
    first, order = {}, {}
    for i, item in enumerate(items):
        pictures = tuple(same_picture(image) for image in item["images"])
        order[i] = item["task"] in GENERATIVE, first.setdefault(pictures, i), i
    for _, group in groupby(sorted(order, key=order.get), key=lambda i: order[i][0]):
        group = list(group)
        yield from (group[start : start + size] for start in range(0, len(group), size))


def score_batch(model, processor, batch: list[dict]) -> list[dict]:
    """Return the result of each item of a batch; the prompts are read once for all that is asked of them.

    Raises:
        ValueError: a picture cannot be decoded.
    """
    try:
        reading = Reading(model, processor, batch)
    except BadRow as error:
        rows = [item["row"] for item in batch]
        raise ValueError(f"Rows {rows} hold a bad one: {error}. Evaluation counts every row, so mend it.") from error
    options = [item["options"] or [item["answer"]] for item in batch]
    scores = reading.scores(options)
    outputs = reading.answers(CAPTION_TOKENS if batch[0]["task"] in GENERATIVE else ANSWER_TOKENS)
    results = []
    for item, output, offered, found in zip(batch, outputs, options, scores, strict=True):
        loss = -found[offered.index(item["answer"])], len(reading.spoken(item["answer"]))
        likeliest = max(zip(found, offered))[1] if item["options"] else None
        results.append(result_of(item, output, loss, likeliest))
    return results


def result_of(item: dict, output: str, loss: tuple[float, int], likeliest: str | None) -> dict:
    """Return the result of one row.

    It holds `row`, `task`, `language`, `question`, `answer`, `output`, `right`, and `nll`, the negative log-likelihood
    of the reference, with its `tokens`. With options it also holds `ranked`, the likeliest of them, and `options`,
    their number; a caption holds `words`, its `word_f1`; a point or box holds `rule`, what makes it right.
    """
    result = {key: item[key] for key in ("row", "task", "language", "question", "answer")}
    result |= {"output": output, "right": is_right(item, output), "nll": loss[0], "tokens": loss[1]}
    if item["task"] in GENERATIVE:
        result["words"] = word_f1(output, item["answer"])
    if is_place(item):
        result["rule"] = RULES[item["task"]]
    if likeliest is not None:
        result |= {"ranked": likeliest, "options": len(item["options"])}
    return result


def summarise(results: list[dict]) -> dict:
    """Return the metrics of all results, whichever process scored them.

    Returns:
        `{"scores": {"loss", "match", "ranked", "words"}, "overall": cell, "tasks": {task: {language: cell}}, "ranked"
        and "words": likewise, "rules": {task: rule}, "answers": [...]}`. A cell holds `match` (share), `hits`,
        `count`, `low` and `high`. `loss` is per answer token, in nats; `match` and `overall` are of right answers and
        leave captions out; `ranked` is the share of options that are ranked right, and its cells hold `options`, the
        largest number of options. `words` is the mean `word_f1` of captions, and its cells have no `hits`. `rules`
        says what is right for tasks where it is not an exact match. `answers` holds each row's texts.
    """
    ranked = [result | {"right": result["ranked"] == result["answer"]} for result in results if "ranked" in result]
    words = [result for result in results if "words" in result]
    overall = cell([result["right"] for result in results if result["task"] not in GENERATIVE])
    scores = {"loss": round(sum(r["nll"] for r in results) / max(1, sum(r["tokens"] for r in results)), 4)}
    scores["match"] = overall["match"]
    if ranked:
        scores["ranked"] = cell([result["right"] for result in ranked])["match"]
    if words:
        scores["words"] = mean_cell([result["words"] for result in words])["match"]
    kept = ("row", "answer", "output", "ranked", "words")
    return {
        "scores": scores,
        "overall": overall,
        "tasks": by_task(results),
        "ranked": by_task(ranked, ranked_cell),
        "words": by_task(words, lambda group: mean_cell([result["words"] for result in group])),
        "rules": {result["task"]: result["rule"] for result in results if "rule" in result},
        "answers": [{key: result[key] for key in kept if key in result} for result in results],
    }


def right_cell(group: list[dict]) -> dict:
    """Return the cell of the right and wrong answers of these results."""
    return cell([result["right"] for result in group])


def ranked_cell(group: list[dict]) -> dict:
    """Return the cell of results that were ranked, with the largest number of options."""
    return right_cell(group) | {"options": max(result["options"] for result in group)}


def by_task(results: list[dict], make: Callable[[list[dict]], dict] = right_cell) -> dict[str, dict[str, dict]]:
    """Return `{task: {language: cell}}` of the results; `make` returns the cell of a group of them."""
    groups = defaultdict(lambda: defaultdict(list))
    for result in sorted(results, key=lambda r: (r["task"], r["language"])):
        groups[result["task"]][result["language"]].append(result)
    return {task: {language: make(group) for language, group in found.items()} for task, found in groups.items()}


def cell(matches: list[bool]) -> dict:
    """Return share, counts and confidence interval of a list of right and wrong answers."""
    low, high = wilson(sum(matches), len(matches))
    share = sum(matches) / len(matches) if matches else 0.0
    return {
        "match": round(share, 4),
        "hits": sum(matches),
        "count": len(matches),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def print_table(metrics: dict) -> None:
    """Print a line per task and language: right answers first, then ranked options, then content words of captions."""
    title = "right" if metrics["rules"] else "exact match"
    print_cells(title, metrics["tasks"] | {"overall": {"": metrics["overall"]}})
    for task, rule in metrics["rules"].items():
        print(f"{task} is right by: {rule}; tasks without a rule by an exact match")
    print(f"loss per answer token: {metrics['scores']['loss']:.4f}")
    for title, key in (("likeliest", "ranked"), ("content words", "words")):
        if metrics[key]:
            print()
            print_cells(title, metrics[key])


def print_cells(title: str, tasks: dict[str, dict[str, dict]]) -> None:
    """Print a table of cells; the title names what `match` is."""
    options = any("options" in c for languages in tasks.values() for c in languages.values())
    last = f"{'options':>9}" if options else ""
    print(f"{'task':<12}{'language':<10}{title:>14}{'95 % interval':>18}{'rows':>8}{last}")
    for task, languages in tasks.items():
        for language, c in languages.items():
            interval, last = f"{c['low']:.1%} - {c['high']:.1%}", f"{c['options']:>9}" if options else ""
            print(f"{task:<12}{language:<10}{c['match']:>14.1%}{interval:>18}{c['count']:>8}{last}")
