"""Hold the format of tool calls: the grammar of a call, and the parts of an answer with thoughts and calls.

    tools -> chat template -> prompt -> model -> answer -> `parse_reply` -> message -> chat template -> ...

`{"type": "function", "function": {"name", "description", "parameters"}}` describes a tool; `transformers.utils`'
`get_json_schema` makes it of a Python function.
"""

import json

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing import parse_response

from minivlm.json_schema import LAYOUT, check_parts, closed, compile_parts

HEADER = "<|im_start|>assistant\n"
# A response template of transformers for what our chat template writes. It does not stand in tokenizer_config.json:
# with one there, `pipeline(..., return_full_text=False)` returns answers with their <|im_end|> (transformers 5.23).
REPLY = {
    "defaults": {"role": "assistant", "content": ""},
    "start_anchor": HEADER,
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)"},
    },
}


def compile_tools(tools: list[dict], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the grammar of one call of one of the tools, as the chat template writes calls.

    Raises:
        ValueError: the parameters of a tool are refused as `compile_schema` does, or have a `$ref`.
    """
    from llguidance import LLMatcher

    calls = []
    for tool in (tool["function"] for tool in tools):
        name, parameters = f"tool {tool['name']}", tool.get("parameters") or {"type": "object", "properties": {}}
        parts = check_parts(parameters, name)
        if any("$ref" in part for _, part in parts):
            raise ValueError(f"{name}: `$ref` is not supported in the parameters of a tool. Write the parts out.")
        compile_parts(parts, parameters, name)
        properties = {"name": {"const": tool["name"]}, "arguments": closed(parameters, parts)}
        calls.append({"type": "object", "properties": properties, "required": list(properties)})
        calls[-1]["additionalProperties"] = False
    schema = json.dumps({"x-guidance": LAYOUT, "anyOf": calls})
    # In this language <NAME> is a token, "NAME" a text of any tokens.
    known = tokenizer.get_added_vocab()
    start, end = (mark if mark in known else json.dumps(mark) for mark in ("<tool_call>", "</tool_call>"))
    return LLMatcher.grammar_from_lark(f'start: {start} "\\n" call "\\n" {end}\ncall: %json {schema}')


def parse_reply(text: str, thinking: bool = False) -> dict:
    """Return the message of an answer: `content`, and where it has them `reasoning_content` and `tool_calls`.

    Args:
        thinking: the prompt was rendered with `enable_thinking=True`, so the answer begins inside of a thought.

    Raises:
        ValueError: a call is no JSON object with `name` and `arguments`.
    """
    try:
        message = parse_response(text, REPLY, prefix=HEADER + ("<think>\n" if thinking else ""))
    except ValueError as error:
        raise ValueError(
            f"The answer has a tool call that is no JSON: {' '.join(str(error).split())[:200]}"
        ) from error
    for call in message.get("tool_calls", []):
        function = call["function"]
        if not (isinstance(function, dict) and isinstance(function.get("name"), str) and "arguments" in function):
            raise ValueError(f"The answer has a tool call without `name` and `arguments`: {str(function)[:200]}")
    return message
