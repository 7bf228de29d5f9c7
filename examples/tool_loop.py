# /// script
# requires-python = ">=3.10"
# dependencies = ["minivlm[schema]"]
# ///
"""Let a model call a Python function: it is asked, its call is parsed and run, and it answers with the result.

    python examples/tool_loop.py data/examples/pig-face.png "Which category does it belong to?"
    python examples/tool_loop.py "Which category does it belong to?" --free --model runs/mine/final

The released model was not trained for tools. So its first answer is held to a grammar: it is always a call of one of
the functions, with arguments that fit. Which arguments, and what it says in the end, is the model's own, and often
wrong. `--free` is for models that were trained for tools: the model decides whether to call.

To use your own functions, change `TOOLS`. A docstring and types describe each one to the model.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from transformers.utils import get_json_schema

from minivlm.asking import question_about
from minivlm.inference import Assistant, Decoding
from minivlm.model.loading import load_trained
from minivlm.tool_calls import compile_tools, parse_reply

SHELVES = {"animals and nature": 1, "food and drink": 2, "objects": 3, "symbols": 4}


def find_shelf(category: str) -> int:
    """Return the number of the shelf where cards of a category are kept.

    Args:
        category: Its category. (choices: ["animals and nature", "food and drink", "objects", "symbols"])
    """
    return SHELVES[category]


TOOLS = [find_shelf]


def run(
    assistant: Assistant, messages: list[dict], tools: list[Callable], free: bool = False, rounds: int = 4
) -> list[dict]:
    """Return the conversation with what the model said, what it called, and what the functions returned.

    Args:
        tools: functions; transformers describes them to the model by their docstrings and types.
        free: let the model decide whether to call; otherwise its first answer is a call.
        rounds: of calls, at most.
    """
    functions, schemas = {tool.__name__: tool for tool in tools}, [get_json_schema(tool) for tool in tools]
    grammar = None if free else compile_tools(schemas, assistant.tokenizer)
    for _ in range(rounds):
        [answer] = assistant.answer([assistant.encode(messages, tools=schemas)], Decoding(128, grammar=grammar))
        message, grammar = parse_reply(answer.text), None
        messages = [*messages, message]
        if not message.get("tool_calls"):
            break
        messages += [{"role": "tool", "content": call(functions, c["function"])} for c in message["tool_calls"]]
    return messages


def call(functions: dict[str, Callable], wanted: dict) -> str:
    """Return the result of a call as JSON; a mistake of the model is a result, too, so that it can try again."""
    if wanted["name"] not in functions:
        return json.dumps({"error": f"no function {wanted['name']}"})
    try:
        return json.dumps(functions[wanted["name"]](**wanted["arguments"]), ensure_ascii=False)
    except Exception as error:  # of any function, called with whatever the model wrote
        return json.dumps({"error": f"{type(error).__name__}: {error}"}, ensure_ascii=False)


def main(argv=None) -> list[dict]:
    """Print the conversation, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="PICTURE ... QUESTION", help="Files, then what to ask.")
    parser.add_argument("--model", default=".", help="Folder or Hub id of a model. Default: this repository.")
    parser.add_argument("--free", action="store_true", help="Let the model decide whether to call a function.")
    args = parser.parse_args(argv)
    *pictures, question = args.words
    assistant = Assistant(*load_trained(args.model))
    messages = run(assistant, [question_about([Path(name) for name in pictures], question)], TOOLS, args.free)
    for message in messages[1:]:
        calls = [c["function"] for c in message.get("tool_calls", [])]
        print(f"{message['role']}: {' '.join([message['content'], *map(json.dumps, calls)]).strip()}")
    return messages


if __name__ == "__main__":
    main(sys.argv[1:])
