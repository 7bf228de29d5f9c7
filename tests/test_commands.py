"""`minivlm COMMAND`: the list is quick, help has examples, a mistake is one line, a fault keeps its traceback."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minivlm.__main__ import COMMANDS, main
from minivlm.cli import DEBUG, Parser, UserError, run_command
from minivlm.commands import convert
from minivlm.resources import RECIPES, find_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [  # enough to reach the data without loading weights
    "train", "--model_config", json.dumps({"text_config": {"model_type": "minivlm_text", "num_hidden_layers": 1}}),
    "--device", "cpu", "--max_steps", "1",
]  # fmt: skip


def call(*arguments, command=("-m", "minivlm")):
    """Run `python -m minivlm ARGUMENTS`, or another command, as a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != DEBUG} | {"HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def mistake(capsys, arguments):
    """Return the one line that `minivlm ARGUMENTS` prints about a mistake, and check its exit code."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line and "%|" not in line]  # no progress bars
    assert code == 2, f"exit code {code}; {captured.err}"
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


# The list of commands


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_the_list_names_every_command_with_a_line(arguments, capsys):
    assert main(list(arguments)) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, text in COMMANDS.items():
        assert any(line.split() == [name, *text.split()] for line in lines)


def test_every_command_has_a_module_and_every_module_is_a_command():
    modules = {path.stem for path in (ROOT / "minivlm" / "commands").glob("*.py")} - {"__init__"}
    assert modules == {name.replace("-", "_") for name in COMMANDS}


def test_the_list_imports_no_library():
    code = (
        "import sys; from minivlm.__main__ import main; main(['--help']); "
        "print(*({m.split('.')[0] for m in sys.modules} - sys.stdlib_module_names))"
    )
    done = call("-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}", command=())
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "minivlm" in loaded and not loaded & {"torch", "transformers", "numpy", "datasets", "yaml"}
    assert {name for name in loaded if not name.startswith("_")} == {"minivlm"}


def test_help_imports_neither_torch_nor_transformers():
    """They take seconds. The commands that are left out have the options of training, which transformers parses."""
    quick = sorted(
        COMMANDS.keys() - {"train", "train-tower", "preview", "benchmark", "benchmark-data", "benchmark-formats"}
    )
    code = f"""
import contextlib, io, sys
from minivlm.__main__ import main
for name in {quick}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([name, "--help"])
    assert "usage: minivlm " + name in out.getvalue(), name
    assert not {{"torch", "transformers", "datasets"}} & sys.modules.keys(), name
"""
    done = call("-c", code, command=())
    assert done.returncode == 0, done.stderr


def test_convert_offers_the_types_that_to_gguf_writes():
    from minivlm.convert.to_gguf import FILE_TYPES

    assert convert.FILE_TYPES == tuple(FILE_TYPES)


def test_an_unknown_command_names_the_nearest(capsys):
    assert "did you mean evaluate?" in mistake(capsys, ["evalute"])
    assert all(name in mistake(capsys, ["zzz"]) for name in COMMANDS)


# Help of a command


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_its_examples_unfolded(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert out.startswith(f"usage: minivlm {name} ")
    doc = importlib.import_module(f"minivlm.commands.{name.replace('-', '_')}").__doc__
    examples = [line.strip() for line in doc.splitlines() if line.strip().startswith("minivlm ")]
    assert [line for line in examples if line.split()[1] == name]
    shown = [line.strip() for line in out.splitlines()]
    assert not [line for line in examples if line not in shown]


def test_help_of_training_has_groups(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    headings = [line for line in capsys.readouterr().out.splitlines() if line.endswith(":") and line[0] != " "]
    assert len(headings) >= 4, headings


# Mistakes that a user can mend


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ([*TRAIN, "--data", "nope.parquet"], ["nope.parquet"]),
        ([*TRAIN, "--data", str(ROOT / "README.md")], ["README.md", "parquet"]),
        ([*TRAIN, "--lerning_rate", "3"], ["--lerning_rate", "did you mean --learning_rate?"]),
        ([*TRAIN, "--learning_rate", "fast"], ["learning_rate", "fast"]),
        (["train", "--model", "nobody/no-such-model"], ["--model nobody/no-such-model"]),
        (["train", "--recipe", "mikro"], ["mikro", "Did you mean micro?", "finetune_folder"]),
        (["evaluate", "nope"], ["nope"]),
        (["evaluate", "nobody/no-such-model"], ["nobody/no-such-model"]),
        (["evaluate", ".", "--data", "nope.parquet"], ["nope.parquet"]),
        (["evaluate", ".", "--limt", "3"], ["--limt", "did you mean --limit?"]),
        (["preview", "nope.parquet"], ["nope.parquet"]),
        (["convert", "to_llava", "nope", "--out", "runs/no-such"], ["nope"]),
        (["convert", "to_llava", "nope", "--out", "runs/no-such", "--verfy"], ["--verfy", "did you mean --verify?"]),
        (["publish", "nope", "--repo_id", "a/b"], ["nope"]),
        (["plot", "nope"], ["nope"]),
        (["benchmark-data", "--data", "nope.parquet"], ["nope.parquet"]),
        (["train-tower", "--recipe", "micro", "--data", "nope.parquet"], ["nope.parquet"]),
        (["train-tower", "--recipe", "finetune_folder"], ["finetune_folder", "no model_config"]),
        (["evaluate", ".", "--limit", "-3"], ["-3", "1 or more"]),
        (["evaluate", ".", "--batch_size", "0"], ["0: must be a whole number, 1 or more"]),
        (["evaluate", ".", "--device", "gpu"], ["--device gpu", "Use cpu"]),
        (["evaluate", ".", "--device", "cuda:99"], ["--device cuda:99"]),
        (["preview", "data/dev.parquet", "--rows", "-1"], ["-1", "0 or more"]),
        (["preview", "data/dev.parquet", "--model", "nope"], ["nope: no folder with a model"]),
        (["benchmark-data", "--rows", "0"], ["1 or more"]),
        (["convert", "to_llava", "--hepl"], ["--hepl", "did you mean --help?"]),
    ],
    ids=lambda value: " ".join(value[-3:])[-50:] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments, wanted, capsys, monkeypatch):
    monkeypatch.delenv(DEBUG, raising=False)
    monkeypatch.chdir(ROOT)
    line = mistake(capsys, arguments)
    assert all(text in line for text in wanted), line


def test_the_training_script_reports_like_the_command():
    done = call("--lerning_rate", "3", command=("train_accelerate.py",))
    assert done.returncode == 2 and "did you mean --learning_rate?" in done.stderr
    assert "Traceback" not in done.stderr and "usage:" not in done.stderr


def test_debug_shows_the_traceback(monkeypatch):
    with pytest.raises((ValueError, OSError)):
        main(["evaluate", "nope", "--debug"])
    monkeypatch.setenv(DEBUG, "1")
    with pytest.raises((ValueError, OSError)):
        main(["evaluate", "nope"])


# The parts of which commands are made


def raising(error):
    def command(argv):
        raise error

    return command


@pytest.mark.parametrize("error", [UserError("a"), ValueError("b"), FileNotFoundError(2, "no such file", "c")])
def test_what_a_user_can_mend_ends_with_code_2(error, capsys, monkeypatch):
    monkeypatch.delenv(DEBUG, raising=False)
    assert run_command(raising(error), []) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ")
    for debug in (lambda: run_command(raising(error), ["--debug"]), lambda: run_command(raising(error), ["x"])):
        with pytest.raises(type(error)):
            debug()
        monkeypatch.setenv(DEBUG, "1")


@pytest.mark.parametrize("error", [TypeError("a"), KeyError("b"), AssertionError("c"), RuntimeError("d")])
def test_a_programming_error_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command(raising(error), [])


def test_an_absent_package_is_named_and_an_absent_module_of_ours_is_a_fault(capsys):
    assert run_command(raising(ModuleNotFoundError("no", name="matplotlib")), []) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        run_command(raising(ModuleNotFoundError("no", name="minivlm.data.gone")), [])


def test_the_check_of_a_configuration_gives_its_own_message(capsys):
    def command(argv):
        from configuration_minivlm import MiniVLMConfig

        MiniVLMConfig(text_config={"model_type": "minivlm_text", "num_attention_heads": 3, "num_key_value_heads": 2})

    assert run_command(command, []) == 2
    err = capsys.readouterr().err
    assert "num_key_value_heads" in err and "StrictDataclass" not in err and err.count("\n") == 1


def test_a_parser_takes_no_abbreviations_and_knows_subcommands(capsys):
    parser = Parser("Do it.\n\n    minivlm do --verbose", prog="minivlm do")
    parser.add_argument("--verbose", action="store_true")
    parser.add_subparsers().add_parser("now").add_argument("--quickly", action="store_true")
    for arguments, hint in ((["--verb"], "--verbose"), (["now", "--quikly=1"], "--quickly")):
        with pytest.raises(SystemExit) as exit:
            parser.parse_args(arguments)
        err = capsys.readouterr().err
        assert exit.value.code == 2 and f"did you mean {hint}?" in err and err.count("\n") == 1
    assert "    minivlm do --verbose\n" in parser.format_help()


def test_a_value_and_an_option_like_no_other_are_unknown_arguments(capsys):
    parser = Parser("Do it.", prog="minivlm do")
    parser.add_argument("--rate")
    for arguments, line in (
        (["--rte", "3"], "error: unknown arguments: --rte 3; did you mean --rate?\n"),
        (["3", "--xyzzy"], "error: unknown arguments: 3 --xyzzy; --help lists the options.\n"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(arguments)
        assert capsys.readouterr().err == line


def test_a_recipe_is_found_by_path_and_by_name(tmp_path, monkeypatch):
    assert "micro" in recipe_names()
    monkeypatch.chdir(tmp_path)
    for name in ("micro", "micro.yaml", "recipes/micro.yaml", RECIPES / "micro.yaml"):
        assert find_recipe(name).samefile(ROOT / "recipes" / "micro.yaml")
    (tmp_path / "micro.yaml").write_text("seed: 1\n")
    assert find_recipe("micro.yaml").samefile(tmp_path / "micro.yaml")  # the user's own file comes first
    with pytest.raises(ValueError, match="--recipe mikro: .* Did you mean micro[?] Recipes are .*finetune_folder"):
        find_recipe("mikro")
    with pytest.raises(ValueError, match="no such file"):
        find_recipe(tmp_path / "other" / "micro.yaml")
