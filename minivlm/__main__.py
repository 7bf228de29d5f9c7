"""List the commands, or run one: `minivlm COMMAND`, or `python -m minivlm COMMAND` in a checkout.

A command is imported when it is run, so that the list appears at once.
"""

import sys
from difflib import get_close_matches
from importlib import import_module

from minivlm.cli import run_command

COMMANDS = {  # name -> what it does; the module is minivlm.commands.NAME
    "ask": "Ask a question about pictures and print the answer.",
    "chat": "Talk with a model about pictures.",
    "app": "Show a page in the browser that answers questions about pictures.",
    "serve": "Serve a model to programs, in the format of OpenAI's chat completions.",
    "caption": "Describe all pictures of a folder, in a file that can train a model.",
    "train": "Train a model; `accelerate launch train_accelerate.py` does the same on several devices.",
    "train-tower": "Train a vision tower as a classifier of labelled pictures.",
    "evaluate": "Answer the questions of a data set and count the right answers.",
    "preview": "Show what training would see of a data set.",
    "convert": "Join parts to a new model, read MiniMind's weights, export to LLaVA, ONNX, GGUF and a web page.",
    "publish": "Upload a trained model to the Hugging Face Hub.",
    "plot": "Draw the loss and the scores of training runs.",
    "benchmark": "Measure how fast a model trains and answers, and its memory, beside its peers.",
    "benchmark-formats": "Measure a model as it is, as ONNX graphs and as GGUF files.",
    "benchmark-data": "Measure how fast rows become batches.",
}


def usage() -> str:
    """Return the list of commands, a line each."""
    lines = [f"  {name:<18}{text}" for name, text in COMMANDS.items()]
    closing = "`minivlm COMMAND --help` lists the options of a command; --debug shows the traceback of an error."
    return "\n".join(["usage: minivlm COMMAND [OPTION ...]", "", *lines, "", closing])


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, rest = argv[0].replace("_", "-"), argv[1:]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}."
        print(f"error: minivlm {name}: no such command; {hint}", file=sys.stderr)
        return 2

    def command(rest: list[str]) -> None:
        # Imported inside: a package that is absent is a mistake that the user can mend, too.
        import_module(f"minivlm.commands.{name.replace('-', '_')}").main(rest)

    return run_command(command, rest)


if __name__ == "__main__":
    sys.exit(main())
