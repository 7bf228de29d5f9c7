"""Run public benchmarks through lmms-eval, on rows of our own in their schemas; nothing is downloaded."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import EntryPoint
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from helpers.benchmarks import SETS, load_local, right_answer, rows_of
from helpers.models import ROOT, save
from minivlm.commands.evaluate import main as evaluate
from minivlm.evaluation import public
from minivlm.evaluation.public import BENCHMARKS, check_tasks, error_of, print_results, run_benchmarks
from minivlm.hub.card import write_card
from minivlm.hub.check import RESULTS, files_of
from minivlm.inference import Answer, Assistant, Decoding

NEEDS = '{} is not installed; pip install ".[benchmarks]" in the checkout'
# What the harness has to report if every answer is right. If every answer is wrong, all are 0 but these.
RIGHT = {
    "mmstar": {"coarse perception": 1.0, "math": 1.0, "average": 1.0},
    "mme": {"mme_perception_score": 200.0, "mme_cognition_score": 200.0},
    "pope": {f"pope_{name}": 1.0 for name in ("accuracy", "precision", "recall", "f1_score")}
    | {"pope_yes_ratio": 0.5},
    "textvqa": {"exact_match": 1.0},
    "scienceqa": {"exact_match": 1.0},
    "mmbench_en": {"gpt_eval_score": 100.0},
    "mmbench_cn": {"gpt_eval_score": 100.0},
    "ocrbench": {"ocrbench_accuracy": 3 / 1000},  # of 1,000 questions, however many were asked
    "coco_captions": {f"coco_{name}": 1.0 for name in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L")}
    | {"coco_CIDEr": 10.0},
}
STAYS = {"pope_yes_ratio": 0.5}  # the harness counts the references, not the answers


@pytest.fixture
def harness(monkeypatch):
    """Return the adapter's class; the Hub's data sets are our rows, and whoever asks a judge fails."""
    pytest.importorskip("lmms_eval", reason=NEEDS.format("lmms-eval"))
    import datasets

    def no_network(*args, **options):
        raise AssertionError(f"a request to {args[:1]}")

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    from minivlm.evaluation.lmms_adapter import MiniVLM

    return MiniVLM


@pytest.fixture
def say(monkeypatch):
    """Return a function: `say(answers)` lets the model give these answers, in this order; it returns the prompts."""

    def stub(answers):
        coming, prompts = iter(answers), []

        def answer(self, encoded, decoding):
            prompts.extend(self.tokenizer.decode(chat["input_ids"]) for chat in encoded)
            return [Answer(next(coming), 1) for _ in encoded]

        monkeypatch.setattr(Assistant, "answer", answer)
        return prompts

    return stub


def values(found, name):
    return {row["metric"]: row["value"] for row in found["results"] if row["benchmark"] == name}


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_right_and_wrong_answers_get_the_ends_of_the_scale(name, harness, say, tiny, tmp_path, monkeypatch):
    """The harness's own prompts, rules and sums, on every benchmark: each question is asked with its picture."""
    monkeypatch.chdir(tmp_path)  # the harness may write files beside us
    check_tasks([name], None)
    rows = rows_of(name)
    for answers, expected in (
        ([right_answer(name, row) for row in rows], RIGHT[name]),
        (["unclear"] * len(rows), {metric: STAYS.get(metric, 0.0) for metric in RIGHT[name]}),
    ):
        prompts = say(answers)
        found = run_benchmarks(harness(tiny, batch_size=3, device="cpu"), [name])
        assert values(found, name) == pytest.approx(expected, abs=1e-3)
        assert [entry["output"] for entry in found["answers"]] == answers
        assert len(prompts) == len(rows) and all(prompt.count("<|image_pad|>") == 4 for prompt in prompts)
        for row, prompt in zip(rows, prompts):
            question = row["question"].removesuffix(" Please answer yes or no.")
            assert name == "coco_captions" or question.lower() in prompt.lower()
        assert {row["dataset"] for row in found["results"]} == {SETS[name][0]}
    assert not list(tmp_path.iterdir()), "the harness's files went to a folder that is gone"


@pytest.mark.slow
def test_part_of_the_answers(harness, say, tiny):
    """Counts, standard errors and MMBench's turned choices: a question is right if each of its turns is."""
    rows = rows_of("mmbench_en")
    say(["A", "The answer is green.", "unclear", "A"])  # the first one is A also where its choices are turned
    found = run_benchmarks(harness(tiny, device="cpu"), ["mmbench_en"])
    assert values(found, "mmbench_en") == {"gpt_eval_score": pytest.approx(100 / 3)}
    say(["yes"] * 4)
    found = run_benchmarks(harness(tiny, device="cpu"), ["pope"])
    lines = {row["metric"]: row for row in found["results"]}
    assert lines["pope_recall"]["value"] == 1.0 and lines["pope_precision"]["value"] == 0.5
    assert lines["pope_accuracy"]["value"] == 0.5 and lines["pope_accuracy"]["n"] == len(rows) == 4
    assert lines["pope_accuracy"]["stderr"] == pytest.approx((1 / 3) ** 0.5 / 2)
    assert lines["pope_f1_score"]["stderr"] is None, "the harness has no error of an F1"


@pytest.mark.slow
def test_the_command_runs_the_model(harness, tiny, tmp_path, capsys, monkeypatch):
    """`minivlm evaluate --tasks`: answers are those of `Assistant`; table, JSON and answers agree."""
    monkeypatch.chdir(tmp_path)
    files = ["--json", "scores.json", "--answers", "answers.jsonl"]
    found = evaluate([tiny, "--tasks", "mme", "pope", "--batch_size", "3", "--device", "cpu", "--limit", "2", *files])
    record = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert record["tasks"] == ["mme", "pope"] and record["limit"] == 2 and record["results"] == found["results"]
    assert record["harness"].startswith("lmms-eval 0.7") and len(record["weights_sha256"]) == 64
    table = capsys.readouterr().out
    assert all(row["metric"] in table for row in found["results"]) and {row["n"] for row in found["results"]} == {2}

    said = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    adapter, expected = harness(tiny, device="cpu"), []
    for name, tokens in (("mme", 16), ("pope", 128)):
        documents = load_local(*SETS[name][:2])["test"]
        for row in documents.select(range(2)):
            words = row["question"].removesuffix(" Please answer yes or no.")
            words += "\nAnswer the question using a single word or phrase."
            content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": words}]
            encoded = adapter.assistant.encode([{"role": "user", "content": content}])
            [answer] = adapter.assistant.answer([encoded], Decoding(tokens))
            expected.append({"benchmark": name, "row": len(expected) % 2, "output": answer.text.partition("\n\n")[0]})
    assert [{key: entry[key] for key in ("benchmark", "row", "output")} for entry in said] == expected


def request(adapter, parts, task="ours", **settings):
    """Return a request of a task whose conversation has these parts: words, pictures, or what the harness writes."""
    from lmms_eval.api.instance import Instance

    def part_of(part):
        if isinstance(part, dict):
            return part
        return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part}

    def make(document):
        return [{"role": "user", "content": list(map(part_of, parts))}]

    adapter.task_dict[task] = {"test": [None]}
    arguments = ("", make, {"max_new_tokens": 8} | settings, 0, task, "test")
    metadata = {"task": task, "doc_id": 0, "repeats": 1}
    return Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)


@pytest.mark.slow
def test_pictures_stand_between_words(harness, tiny, picture):
    """Two pictures keep their places among the words; a batch answers as each request alone."""
    adapter = harness(tiny, device="cpu")
    parts = [picture(1), "Is this the first, and", picture(2), "the second?"]
    requests = [request(adapter, parts), request(adapter, [parts[2], parts[1], parts[0], parts[3]])]
    requests.append(request(adapter, ["No picture at all."]))
    together = adapter.generate_until(requests)
    assert together == [adapter.generate_until([one])[0] for one in requests] and len(set(together)) == 3
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    [answer] = adapter.assistant.answer(
        [adapter.assistant.encode([{"role": "user", "content": content}])], Decoding(8)
    )
    assert together[0] == answer.text
    with pytest.raises(ValueError, match="'video'"):
        adapter.generate_until([request(adapter, [{"type": "video", "url": "a.mp4"}])])


@pytest.mark.slow
def test_long_prompts_are_counted(harness, tiny, capsys):
    """The model reads 512 tokens: a longer prompt is answered by nothing, one that leaves little room in short."""
    adapter = harness(tiny, device="cpu")
    room = adapter.assistant.room
    turns = ([{"role": "user", "content": [{"type": "text", "text": "dog " * n}]}] for n in (1, 2))
    one, two = (len(adapter.assistant.encode(turn)["input_ids"]) for turn in turns)
    tight = "dog " * ((room - one) // (two - one) - 3)
    texts = ("dog " * 3, tight, "dog " * room, "dog " * 3)
    requests = [request(adapter, [text], max_new_tokens=40) for text in texts]
    first, short, nothing, last = adapter.generate_until(requests)
    assert nothing == "" and first == last and len(first) > len(short) > 0
    assert adapter.too_long == {"ours": 1} and adapter.shortened == {"ours": 1}
    print_results({"results": [], "harness": "x", "too_long": adapter.too_long, "shortened": adapter.shortened})
    assert "ours: 1 prompts are longer" in (said := capsys.readouterr().out) and "ours: 1 prompts left less" in said


@pytest.mark.slow
def test_settings_are_obeyed_or_refused(harness, tiny):
    """Stops cut the answer; sampling and beams are refused, for answers here are greedy."""
    adapter = harness(tiny, device="cpu")
    [whole] = adapter.generate_until([request(adapter, ["Hello"])])
    stop = whole[len(whole) // 2]
    [cut] = adapter.generate_until([request(adapter, ["Hello"], until=[stop])])
    assert cut == whole.partition(stop)[0] != whole
    for settings in ({"num_beams": 4}, {"do_sample": True, "temperature": 0.7}):
        with pytest.raises(ValueError, match="greedily"):
            adapter.generate_until([request(adapter, ["Hello"], **settings)])
    with pytest.raises(ValueError, match="log-likelihoods"):
        adapter.loglikelihood([request(adapter, ["Hello"])])


@pytest.mark.slow
def test_the_harness_finds_the_adapter(harness, monkeypatch):
    """setup.cfg's entry point is what `python -m lmms_eval --model minivlm` resolves."""
    from lmms_eval.models import registry_v2

    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    [[name, value]] = [
        line.split(" = ") for line in config["options.entry_points"]["lmms_eval.models"].split("\n") if line
    ]
    points = [EntryPoint(name, value, "lmms_eval.models")]
    registry = registry_v2.ModelRegistryV2()
    monkeypatch.setattr(registry, "_select_entry_points", lambda group: points)
    registry.load_entrypoint_manifests()
    assert registry.get_model_class("minivlm") is harness


@pytest.mark.slow
def test_the_harness_own_command_runs_the_model(harness, tiny, tmp_path):
    """`python -m lmms_eval --model minivlm`, as with an installed MiniVLM, on POPE's task and rows of our own."""
    import lmms_eval

    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    points = config["options.entry_points"]["lmms_eval.models"].strip()
    metadata = tmp_path / "site" / "minivlm-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: minivlm\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(f"[lmms_eval.models]\n{points}\n")
    load_local(*SETS["pope"][:2])["test"].to_parquet(tmp_path / "rows.parquet")
    task = {"include": str(Path(lmms_eval.__file__).parent / "tasks" / "pope" / "pope.yaml"), "task": "pope_ours"}
    task |= {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.parquet")}}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pope_ours.yaml").write_text(yaml.safe_dump(task))
    command = [sys.executable, "-m", "lmms_eval", "--model", "minivlm", "--model_args", f"pretrained={tiny}"]
    command += ["--tasks", "pope_ours", "--include_path", str(tmp_path / "tasks"), "--batch_size", "3"]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "out"), "--log_samples"]
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])  # the checkout may have metadata of an older build
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    [results] = (tmp_path / "out").rglob("*_results.json")
    found = json.loads(results.read_text(encoding="utf-8"))
    assert "lmms_adapter.MiniVLM" in found["config"]["model_backend"]
    assert found["results"]["pope_ours"]["pope_yes_ratio,none"] == 0.5
    [samples] = (tmp_path / "out").rglob("*_samples_pope_ours.jsonl")
    assert len(samples.read_text(encoding="utf-8").splitlines()) == 4


@pytest.mark.slow
def test_names_are_those_of_the_installed_harness(harness):
    """Each benchmark names a task of the installed package that reads the data set our rows stand for."""
    tasks = public.load_tasks(list(BENCHMARKS))
    for name, task in tasks.items():
        assert (task.config.dataset_path, task.config.dataset_name, task.config.test_split) == SETS[name][:3]
        assert task.OUTPUT_TYPE == "generate_until" and BENCHMARKS[name].metric in task.aggregation()


def test_mistakes_are_one_line(monkeypatch, tiny, capsys):
    """Unknown names, an absent package, a limit that splits pairs, options that exclude each other."""
    with pytest.raises(ValueError, match="--tasks mmstarr: unknown. Known are mmstar, mme, pope"):
        evaluate([tiny, "--tasks", "mmstarr"])
    monkeypatch.setattr(public, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lmms-eval. Install it: pip install .minivlm\[benchmarks\]"):
        evaluate([tiny, "--tasks", "mmstar"])
    monkeypatch.setattr(public, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="--limit 3: mme scores pairs"):
        check_tasks(["mmstar", "mme"], 3)
    monkeypatch.setattr(public.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="Java"):
        check_tasks(["coco_captions"], None)
    with pytest.raises(ValueError, match="--among name"):
        evaluate([tiny, "--tasks", "mmstar", "--among", "name"])
    with pytest.raises(SystemExit):
        evaluate([tiny, "--tasks", "mmstar", "--data", "x.parquet"])
    assert "not allowed with" in capsys.readouterr().err


def test_an_error_stands_beside_means_only():
    assert error_of(0.5, [0, 1, 0, 1]) == pytest.approx((1 / 3) ** 0.5 / 2)
    assert error_of(0.4, [0, 1, 0, 1]) is None and error_of(1.0, [1]) is None and error_of(0.5, [None, None]) is None


ROW = {"benchmark": "pope", "task": "pope", "dataset": "lmms-lab-encoder/POPE", "n": 9000}
RECORD = {
    "harness": "lmms-eval 0.7.3",
    "limit": None,
    "results": [
        ROW | {"metric": "pope_accuracy", "value": 0.75, "stderr": 0.0046},
        ROW | {"metric": "pope_f1_score", "value": 0.5, "stderr": None},
    ],
}


def test_results_stand_in_the_card_and_in_eval_results(tmp_path):
    """benchmarks.json beside the weights: table, model-index and the file that the Hub reads hold its values."""
    save(tmp_path)
    weights = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    path = tmp_path / "benchmarks.json"
    path.write_text(json.dumps(RECORD | {"weights_sha256": weights}), encoding="utf-8")
    write_card(tmp_path, "owner/name", None)
    card = ModelCard.load(tmp_path / "README.md")
    found = {result.metric_type: (result.dataset_type, result.metric_value) for result in card.data.eval_results}
    assert found == {row["metric"]: (row["dataset"], row["value"]) for row in RECORD["results"]}
    assert "| pope | pope_accuracy | 0.7500 | 9000 answers, standard error 0.0046, lmms-eval 0.7.3 |" in card.text
    entries = yaml.safe_load((tmp_path / RESULTS).read_text(encoding="utf-8"))
    parsed = huggingface_hub.parse_eval_result_entries(entries)
    assert huggingface_hub.eval_result_entries_to_yaml(parsed) == entries, "a key that the library does not know"
    values = {entry.task_id: entry.value for entry in parsed}
    assert values == {"pope-pope_accuracy": 0.75, "pope-pope_f1_score": 0.5}
    (tmp_path / ".eval_results" / ".env").write_text("secret")
    assert [name for name in files_of(tmp_path) if name.parts[0][0] == "."] == [RESULTS]
    path.write_text(json.dumps(RECORD | {"weights_sha256": "0"}), encoding="utf-8")
    with pytest.raises(ValueError, match="results of other weights"):
        write_card(tmp_path, "owner/name", None)
