"""Score the answers of a model to the rows of a data set, per task and language, with confidence intervals."""

import math
import unicodedata
from collections import defaultdict

from tqdm.auto import tqdm
from transformers import ProcessorMixin

from minivlm.data.bad_rows import BadRow
from minivlm.data.rows import Rows
from minivlm.inference import answer, answer_loss, rank

GENERATIVE = ("caption",)  # free text: exact match says little, so these stay out of the overall figure


def normalise(text: str) -> str:
    """Return an answer without surrounding blanks, a closing full stop and the difference of upper and lower case."""
    return unicodedata.normalize("NFKC", text).strip().rstrip(".。").strip().casefold()


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
        ValueError: a row cannot be read, has no answer at its end, or an answer that is none of its options.
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
            }
        )
    return prepared


def evaluate(model, processor, rows: Rows, limit: int | None = None, batch_size: int = 64) -> dict:
    """Return the metrics of the first `limit` rows, as `summarise` does."""
    return summarise(score_rows(model, processor, rows.select(range(min(limit or len(rows), len(rows)))), batch_size))


def score_rows(model, processor, rows: Rows, batch_size: int = 64, quiet: bool = False) -> list[dict]:
    """Answer every row; return one result per row.

    A result holds `row`, `task`, `language`, `question`, `answer`, `output`, `right`, and `nll`, the negative
    log-likelihood of the reference, with its `tokens`. With options it also holds `ranked`, the likeliest of them.
    """
    was_training = model.training
    model.eval()
    items = prompts(rows, processor)
    by_length = sorted(range(len(items)), key=lambda i: (items[i]["task"] in GENERATIVE, len(items[i]["text"])))

    def batched(method, chosen: list[int], size: int, doing: str) -> dict[int, object]:
        results = {}
        for start in tqdm(range(0, len(chosen), size), desc=doing, unit="batch", disable=quiet or not chosen):
            batch = chosen[start : start + size]
            try:
                results |= zip(batch, method(model, processor, [items[i] for i in batch]))
            except BadRow as error:
                raise ValueError(
                    f"Rows {batch} hold a bad one: {error}. Evaluation counts every row, so mend it."
                ) from error
        return results

    outputs = batched(answer, by_length, batch_size, "answering")
    losses = batched(answer_loss, by_length, batch_size, "reading answers")
    ranked = batched(rank, [i for i in by_length if items[i]["options"]], max(1, batch_size // 4), "ranking options")
    model.train(was_training)
    results = []
    for i, item in enumerate(items):
        result = {key: item[key] for key in ("row", "task", "language", "question", "answer")}
        result |= {"output": outputs[i], "right": normalise(outputs[i]) == normalise(item["answer"])}
        result |= {"nll": losses[i][0], "tokens": losses[i][1]}
        results.append(result | ({"ranked": ranked[i]} if i in ranked else {}))
    return results


def summarise(results: list[dict]) -> dict:
    """Return the metrics of all results, whichever process scored them.

    Returns:
        `{"scores": {"loss", "match", "ranked"}, "overall": cell, "tasks": {task: {language: cell}}, "ranked":
        likewise, "answers": [...]}`. A cell holds `match` (share), `hits`, `count`, `low` and `high`. `loss` is per
        answer token, in nats; `match` and `overall` are of exact matches and leave captions out; `ranked` is the share
        of options that are ranked right. `answers` holds each row's texts.
    """
    ranked = [result | {"right": result["ranked"] == result["answer"]} for result in results if "ranked" in result]
    overall = cell([result["right"] for result in results if result["task"] not in GENERATIVE])
    scores = {"loss": round(sum(r["nll"] for r in results) / max(1, sum(r["tokens"] for r in results)), 4)}
    scores["match"] = overall["match"]
    if ranked:
        scores["ranked"] = cell([result["right"] for result in ranked])["match"]
    kept = ("row", "answer", "output", "ranked")
    return {
        "scores": scores,
        "overall": overall,
        "tasks": by_task(results),
        "ranked": by_task(ranked),
        "answers": [{key: result[key] for key in kept if key in result} for result in results],
    }


def by_task(results: list[dict]) -> dict[str, dict[str, dict]]:
    """Return `{task: {language: cell}}` of the results."""
    groups = defaultdict(lambda: defaultdict(list))
    for result in sorted(results, key=lambda r: (r["task"], r["language"])):
        groups[result["task"]][result["language"]].append(result["right"])
    return {task: {language: cell(r) for language, r in languages.items()} for task, languages in groups.items()}


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
    """Print a line per task and language, exact matches first, then ranked options."""
    print(f"{'task':<12}{'language':<10}{'exact match':>12}{'95 % interval':>18}{'rows':>8}")
    for task, languages in metrics["tasks"].items():
        for language, c in languages.items():
            print_cell(task, language, c)
    print_cell("overall", "", metrics["overall"])
    print(f"loss per answer token: {metrics['scores']['loss']:.4f}")
    if metrics["ranked"]:
        print(f"\n{'task':<12}{'language':<10}{'likeliest':>12}{'95 % interval':>18}{'rows':>8}")
    for task, languages in metrics["ranked"].items():
        for language, c in languages.items():
            print_cell(task, language, c)


def print_cell(task: str, language: str, c: dict) -> None:
    """Print the line of one task and language."""
    interval = f"{c['low']:.1%} - {c['high']:.1%}"
    print(f"{task:<12}{language:<10}{c['match']:>12.1%}{interval:>18}{c['count']:>8}")
