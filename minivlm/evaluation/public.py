"""Run public benchmarks by lmms-eval (EvolvingLMMs-Lab), the field's harness: its tasks, prompts and metrics.

The harness is imported inside functions: it takes 15 seconds, and it is an extra that not everybody has installed.
"""

import math
import shutil
from argparse import Namespace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from minivlm.cli import UserError, describe


class Benchmark(NamedTuple):
    """Name the harness's task of a benchmark, its folder of tasks, and the metric to quote first."""

    task: str
    folder: str
    metric: str


BENCHMARKS = {
    "mmstar": Benchmark("mmstar", "mmstar", "average"),
    "mme": Benchmark("mme", "mme", "mme_perception_score"),
    "pope": Benchmark("pope", "pope", "pope_f1_score"),
    "textvqa": Benchmark("textvqa_val", "textvqa", "exact_match"),
    "scienceqa": Benchmark("scienceqa_img", "scienceqa", "exact_match"),
    "mmbench_en": Benchmark("mmbench_en_dev_static", "mmbench", "gpt_eval_score"),
    "mmbench_cn": Benchmark("mmbench_cn_dev", "mmbench", "gpt_eval_score"),
    "ocrbench": Benchmark("ocrbench", "ocrbench", "ocrbench_accuracy"),
    "coco_captions": Benchmark("coco2017_cap_val", "coco_cap", "coco_CIDEr"),
}
INSTALL = 'pip install "minivlm[benchmarks]", in a checkout: pip install ".[benchmarks]"'


def manifest():
    """Return what the harness has to know of our adapter; setup.cfg names this function in `lmms_eval.models`.

    It stands here, not beside the adapter: the harness calls it while it is itself being imported.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="minivlm", chat_class_path="minivlm.evaluation.lmms_adapter.MiniVLM")


def check_tasks(names: list[str], limit: int | None) -> None:
    """Refuse what would fail after minutes of loading.

    Raises:
        UserError: a name is unknown, the harness or Java is absent, or the limit splits MME's pairs.
    """
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise UserError(
            f"--tasks {' '.join(unknown)}: unknown. Known are {', '.join(BENCHMARKS)}; for the harness's other tasks: "
            "python -m lmms_eval --model minivlm --model_args pretrained=FOLDER --tasks NAME."
        )
    if find_spec("lmms_eval") is None:
        raise UserError(f"--tasks needs the package lmms-eval. Install it: {INSTALL}")
    if "mme" in names and limit and limit % 2:
        raise UserError(f"--limit {limit}: mme scores pairs of questions. Give an even number.")
    if "coco_captions" in names and shutil.which("java") is None:
        raise UserError(
            "coco_captions needs Java for the tokenizer and METEOR of pycocoevalcap. Install a JRE, 8 or later."
        )


def judge_free_score(results: list[dict], args: Namespace) -> float:
    """Return the percentage of MMBench's right answers by the harness's static rule, which mmbench_en_dev_static uses.

    The rule of `mmbench_cn_dev` asks a GPT for each answer that holds no letter of a choice, and draws a letter at
    random where it gets no reply. The static rule counts such an answer as wrong.
    """
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    return MMBench_Evaluator().eval_result(results, eval_method="static")[0] * 100


def load_tasks(names: list[str]) -> dict[str, object]:
    """Return the harness's task of each benchmark; their data sets are downloaded from the Hub where not yet there."""
    import lmms_eval.tasks
    from lmms_eval.tasks import TaskManager
    from tenacity import RetryError

    root = Path(lmms_eval.tasks.__file__).parent
    folders = {str(root / BENCHMARKS[name].folder) for name in names}
    manager = TaskManager(include_defaults=False, include_path=sorted(folders), model_name="minivlm")
    tasks = {}
    for name in names:
        wanted = BENCHMARKS[name].task
        if name == "mmbench_cn":
            metric = {"metric": "gpt_eval_score", "aggregation": judge_free_score, "higher_is_better": True}
            wanted = {"task": wanted, "metric_list": [metric]}
        try:
            [tasks[name]] = manager.load_task_or_group([wanted], task_type="chat").values()
        except RetryError as error:  # the harness tries five times
            cause = error.last_attempt.exception()
            raise UserError(f"{name}: its data set cannot be loaded from the Hub: {describe(cause)}") from cause
    return tasks


def run_benchmarks(adapter, names: list[str], limit: int | None = None) -> dict:
    """Return the results of the benchmarks.

    Args:
        adapter: `evaluation.lmms_adapter.MiniVLM`, which the harness asks for answers.
        names: keys of BENCHMARKS.

    Returns:
        `{"harness", "results": [row], "too_long", "shortened", "answers"}`. A row has `benchmark`, `task`, `dataset`,
        `metric`, `value`, `stderr` (None where it is unknown) and `n`, the number of answers. `too_long` and
        `shortened` are those of the adapter. `answers` holds each question's reference and output.
    """
    from lmms_eval.evaluator import simple_evaluate

    tasks = load_tasks(names)
    with TemporaryDirectory() as folder:  # for the files to submit to a test server, which no benchmark here has
        found = simple_evaluate(
            model=adapter, tasks=list(tasks.values()), limit=limit, log_samples=True, bootstrap_iters=0,
            cli_args=Namespace(output_path=folder, process_with_media=True),
        )  # fmt: skip
    rows, answers = [], []
    for name, task in tasks.items():
        samples = found["samples"][task.config.task]
        same = {"benchmark": name, "task": task.config.task, "dataset": task.config.dataset_path}
        rows += [same | row for row in result_rows(found["results"][task.config.task], samples)]
        answers += [
            {
                "benchmark": name,
                "row": sample["doc_id"],
                "answer": sample["target"],
                "output": sample["filtered_resps"][0],
            }
            for sample in samples
        ]
    counts = {"too_long": dict(adapter.too_long), "shortened": dict(adapter.shortened)}
    return {"harness": f"lmms-eval {version('lmms_eval')}", "results": rows} | counts | {"answers": answers}


def result_rows(values: dict, samples: list[dict]) -> list[dict]:
    """Return metric, value, standard error and number of answers of each metric of a task.

    The error is that of a mean, so it stands only where the value is the mean of the answers' scores: the harness also
    reports it for MME's sums and POPE's precision, where it says nothing.
    """
    rows = []
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if not kind or "_stderr" in metric or not isinstance(value, (int, float)):  # a file to submit has no value
            continue
        scores = [sample[metric] for sample in samples if metric in sample]
        scores = [score.get("score") if isinstance(score, dict) else score for score in scores]
        rows.append({"metric": metric, "value": float(value), "stderr": error_of(value, scores), "n": len(scores)})
    return rows


def error_of(value: float, scores: list) -> float | None:
    """Return the standard error of the mean of `scores`; None unless this mean is `value`."""
    if len(scores) < 2 or not all(isinstance(score, (int, float)) for score in scores):
        return None
    mean = sum(scores) / len(scores)
    if not math.isclose(mean, value, abs_tol=1e-9):
        return None
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores))


def print_results(found: dict) -> None:
    """Print a line per metric, and how many prompts were too long."""
    print(f"{'benchmark':<15}{'metric':<26}{'value':>10}{'stderr':>10}{'answers':>9}")
    for row in found["results"]:
        stderr = "-" if row["stderr"] is None else f"{row['stderr']:.4f}"
        print(f"{row['benchmark']:<15}{row['metric']:<26}{row['value']:>10.4f}{stderr:>10}{row['n']:>9}")
    for task, count in found["too_long"].items():
        print(f"{task}: {count} prompts are longer than the model reads; their answers are empty and count as such")
    for task, count in found["shortened"].items():
        print(f"{task}: {count} prompts left less room for the answer than the task allows")
    print(f"by {found['harness']}")
