"""Turn the metrics of an evaluation into the results of a model card."""

from collections.abc import Iterator

from huggingface_hub import EvalResult

from minivlm.hub.secrets import anonymous

KINDS = (  # key of the metrics, metric, title, what follows the name of a task in a list of all
    ("tasks", "exact_match", "Exact match", ""),
    ("ranked", "accuracy", "Likeliest option", "-likeliest"),
    ("words", "f1", "Content words", "-words"),
)


def cells(metrics: dict) -> Iterator[tuple[str, str, str, dict]]:
    """Yield metric, title, part (`name-en`, "" for all) and cell of each share in the metrics of an evaluation.

    A task with a rule of its own, like "point in box", has this rule as its title.
    """
    if metrics.get("overall"):
        yield "exact_match", "Exact match", "", metrics["overall"]
    for key, metric, title, _ in KINDS:
        for task, languages in metrics.get(key, {}).items():
            rule = metrics.get("rules", {}).get(task) if key == "tasks" else None
            for language, cell in languages.items():
                part = f"{task}-{language}"
                yield ("accuracy", rule[0].upper() + rule[1:], part, cell) if rule else (metric, title, part, cell)


def counts(cell: dict) -> str:
    """Return of how many answers a share is; the mean of captions has no count of right ones."""
    return f"{cell['hits']} of {cell['count']}" if "hits" in cell else f"mean of {cell['count']}"


def evidence(cell: dict) -> str:
    """Return counts and interval of a share, for a reader."""
    return f"{counts(cell)}, 95 % interval {cell['low']:.4f} to {cell['high']:.4f}"


def eval_results(metrics: dict, sources: list[str]) -> list[EvalResult]:
    """Return the model-index: one entry per task and language, and one over all of them."""
    hub = [source.split(":")[1] for source in sources if source.startswith("hub:")]
    data = {"dataset_type": hub[0] if hub else "custom", "dataset_name": anonymous(", ".join(sources)) or "evaluation"}
    return [
        EvalResult(
            "image-text-to-text", metric_type=metric, metric_name=f"{title} ({evidence(cell)})",
            metric_value=cell["match"], dataset_config=part or None, **data,
        )
        for metric, title, part, cell in cells(metrics)
    ]  # fmt: skip
