"""Read a JSON Schema and compile it to the grammar that an answer follows; refuse, in one line, what cannot work.

    schema.json -> text -> schema -> checks -> grammar of llguidance

All checks come before the model is loaded and take less than a second. A keyword that llguidance would ignore is
refused, so an answer that follows the grammar fits the whole schema. Nothing is fetched: a `$ref` stays in the file.
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

TOKENIZER = Path(__file__).parent / "assets" / "tokenizer.json"  # rehearsals need any vocabulary of words
MAX_BYTES = 65_536
MAX_DEPTH = 64  # brackets inside of brackets
MAX_PARTS = 1_000  # schemas inside of the schema
MAX_PATTERN, MAX_PATTERNS = 500, 32  # characters of a regular expression, and how many there may be
MAX_COUNTS = 10_000  # product of the upper counts of a pattern, as 30 * 30 of ([ab]{2,30}c){3,30}
MAX_SHORTEST = 10_000  # characters of the shortest answer
REHEARSED = 600  # tokens, shared by the schema and its patterns
REHEARSED_WORK = 50_000  # at each of these tokens, a quarter of what llguidance allows an answer: its paths are others

LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes
COUNTED = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")  # the counts of a{3}, a{3,} and a{3,9}
SCHEMA, NUMBER, COUNT, ANYTHING = (dict, bool), (int, float), (int,), (object,)
KEYWORDS = {
    "type": (str, list), "enum": (list,), "const": ANYTHING, "format": (str,), "$ref": (str,),
    "allOf": (list,), "anyOf": (list,), "oneOf": (list,), "$defs": (dict,), "definitions": (dict,),
    "properties": (dict,), "additionalProperties": SCHEMA, "required": (list,),
    "items": SCHEMA, "prefixItems": (list,), "minItems": COUNT, "maxItems": COUNT,
    "pattern": (str,), "minLength": COUNT, "maxLength": COUNT,
    "minimum": NUMBER, "maximum": NUMBER, "exclusiveMinimum": NUMBER, "exclusiveMaximum": NUMBER, "multipleOf": NUMBER,
}  # fmt: skip
# Keywords that hold a schema, schemas by name, and lists of schemas.
HOLD_ONE = ("items", "additionalProperties")
HOLD_NAMED = ("properties", "$defs", "definitions")
HOLD_LIST = ("allOf", "anyOf", "oneOf", "prefixItems")
# Keywords that describe and ask nothing of an answer.
REMARKS = "title description default examples $comment deprecated readOnly writeOnly".split()
AT_ROOT = ["$schema", "$id"]
NAMES = {
    dict: "an object",
    bool: "true or false",
    str: "a text",
    list: "a list",
    int: "a whole number",
    float: "a number",
}


def check_package(option: str) -> None:
    """Raise ValueError if llguidance is not installed."""
    if find_spec("llguidance") is None:
        raise ValueError(f"{option} needs the package llguidance. Install it: pip install minivlm[schema]")


def read_schema(path: str) -> dict:
    """Return the schema in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large or deep, or no JSON object.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    return parse_schema(data, path)


def parse_schema(data: bytes, name: str) -> dict:
    """Return the schema in the bytes of a file that errors call `name`."""
    if (depth := nesting(data)) > MAX_DEPTH:
        raise ValueError(f"{name}: {depth:,} nested levels or more, more than {MAX_DEPTH}. Use a flatter schema.")
    if len(data) > MAX_BYTES:
        raise ValueError(f"{name}: more than {MAX_BYTES:,} bytes. Use a smaller schema.")
    try:
        schema = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
        json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()  # no NaN, no 1e999, no half characters
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: no JSON: {error}. Write a JSON Schema.") from error
    if not isinstance(schema, dict):
        raise ValueError(f"{name}: {json.dumps(schema)[:40]} is no JSON Schema. Write an object with `type`.")
    return schema


def unique(pairs: list[tuple[str, object]]) -> dict:
    """Return a JSON object; raise ValueError if a key stands twice, since the first would be lost."""
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in names if names.count(key) > 1)[:80]!r} stands twice")
    return keys


def nesting(data: bytes) -> int:
    """Return how deep brackets stand inside of brackets; those in strings do not count."""
    depth = deepest = 0
    inside = escaped = False
    for byte in data:
        if inside:
            inside = byte != 0x22 or escaped
            escaped = byte == 0x5C and not escaped
        elif byte == 0x22:
            inside = True
        elif byte in b"{[":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"}]":
            depth -= 1
    return deepest


def compile_schema(schema: dict, name: str = "schema") -> str:
    """Return the grammar of the answers that fit a schema.

    Raises:
        ValueError: a keyword is not supported, a limit is passed, or no answer fits.
    """
    return compile_parts(check_parts(schema, name), schema, name)


def compile_parts(parts: list[tuple[str, dict]], schema: dict, name: str) -> str:
    """Return what `compile_schema` returns, for a schema whose `parts` are those of `check_parts`."""
    from llguidance import LLMatcher

    check_references(parts, schema, name)
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(closed(schema, parts)), overrides=LAYOUT)
    check_grammar(grammar, name)
    check_length(shortest_answer(schema, parts), name)
    rehearse(grammar, [part["pattern"] for _, part in parts if "pattern" in part], name)
    return grammar


def closed(schema: dict, parts: list[tuple[str, dict]]) -> dict:
    """Return a schema whose objects have no properties but those that it names, where it leaves that open.

    Its answers fit the given schema, too. Without it a small model invents properties without end. A schema that
    composes objects stays as it is: what one part names, another would refuse.
    """
    composed = ("$ref", "anyOf", "oneOf")
    if any("allOf" in part or ("properties" in part and any(key in part for key in composed)) for _, part in parts):
        return schema
    copies = {id(part): dict(part) for _, part in parts}

    def copy_of(value):
        return copies.get(id(value), value)

    for copy in copies.values():
        copy |= {key: copy_of(copy[key]) for key in HOLD_ONE if key in copy}
        for key in copy.keys() & HOLD_NAMED:
            copy[key] = {name: copy_of(value) for name, value in copy[key].items()}
        copy |= {key: [copy_of(value) for value in copy[key]] for key in HOLD_LIST if key in copy}
        if "properties" in copy and set(copy.get("required", [])) <= set(copy["properties"]):
            copy.setdefault("additionalProperties", False)
    return copies[id(schema)]


def held(schema: dict) -> Iterator[tuple[str, object]]:
    """Yield the place and the value of each schema that stands directly in a schema."""
    yield from ((key, schema[key]) for key in HOLD_ONE if key in schema)
    for key in HOLD_NAMED:
        yield from ((f"{key}/{name}", value) for name, value in schema.get(key, {}).items())
    for key in HOLD_LIST:
        yield from ((f"{key}/{i}", value) for i, value in enumerate(schema.get(key, [])))


def check_parts(schema: dict, name: str) -> list[tuple[str, dict]]:
    """Return the place of each schema in a schema, itself included, and the schema; refuse what is not supported."""
    parts, waiting = [], [("#", schema)]
    while waiting:
        where, part = waiting.pop()
        if isinstance(part, bool):
            continue
        if not isinstance(part, dict):
            raise ValueError(f"{name}: {where} is {json.dumps(part)[:40]}. Write a schema there, an object.")
        for key, value in part.items():
            check_keyword(f"{name}: {where[:200]}", key, value, at_root=part is schema)
        parts.append((where, part))
        if len(parts) > MAX_PARTS:
            raise ValueError(f"{name}: more than {MAX_PARTS:,} schemas inside of it. Use fewer properties.")
        waiting += [(f"{where}/{place}", value) for place, value in held(part)]
    if (count := sum("pattern" in part for _, part in parts)) > MAX_PATTERNS:
        raise ValueError(f"{name}: {count} patterns, more than {MAX_PATTERNS}. Use fewer.")
    return parts


def check_keyword(place: str, key: str, value, at_root: bool) -> None:
    """Refuse a keyword that is not supported, or whose value is of a wrong type."""
    if key in REMARKS or (key in AT_ROOT and at_root):
        return
    if key not in KEYWORDS:
        near = get_close_matches(key, KEYWORDS, n=1, cutoff=0.8)
        hint = f", did you mean {near[0]!r}?" if near else ". Leave it out."
        raise ValueError(f"{place}: the keyword {key[:80]!r} is not supported{hint}")
    wanted = KEYWORDS[key]
    fits = isinstance(value, wanted) and (bool in wanted or object in wanted or not isinstance(value, bool))
    if not fits or (wanted == COUNT and value < 0):
        kinds = " or ".join(NAMES[kind] for kind in wanted)
        raise ValueError(f"{place}: {key} is {json.dumps(value)[:40]}. It must be {kinds}.")
    if key in ("required", "type") and isinstance(value, list) and not all(isinstance(item, str) for item in value):
        raise ValueError(f"{place}: {key} has {json.dumps(value)[:40]}. It must be a list of texts.")
    if key == "pattern":
        check_pattern(place, value)


def check_pattern(place: str, pattern: str) -> None:
    """Refuse a pattern that is long, or whose counts multiply to a large number of states."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"{place}: a pattern of {len(pattern):,} characters, more than {MAX_PATTERN}. Shorten it.")
    counts = math.prod(max(1, int(most or least)) for least, most in COUNTED.findall(pattern))
    if counts > MAX_COUNTS:
        raise ValueError(
            f"{place}: the counts of the pattern {pattern[:80]!r} multiply to {counts:,}, more than {MAX_COUNTS:,}. "
            "Use smaller ones, or fewer."
        )


def check_references(parts: list[tuple[str, dict]], schema: dict, name: str) -> None:
    """Refuse a `$ref` that leaves the file or leads nowhere."""
    for where, part in parts:
        if "$ref" not in part:
            continue
        reference = part["$ref"]
        if reference != "#" and not reference.startswith("#/"):
            raise ValueError(
                f"{name}: {where[:200]}: $ref {reference[:200]!r} is not in this file, and nothing is fetched. Copy "
                "what it names to $defs, and write #/$defs/NAME."
            )
        if not isinstance(target(schema, reference), dict | bool):
            raise ValueError(f"{name}: {where[:200]}: $ref {reference[:200]!r} leads to no schema. Correct it.")


def target(schema: dict, reference: str):
    """Return the value that a `$ref` in the file leads to; None without one."""
    found = schema
    for key in reference.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            found = found[int(key)] if key.isdecimal() and int(key) < len(found) else None
        else:
            found = found.get(key) if isinstance(found, dict) else None
    return found


def check_length(length: float, name: str) -> None:
    """Refuse a schema whose shortest answer is very long, or has no end."""
    if length == math.inf:
        raise ValueError(
            f"{name}: no answer has an end: the schema asks for itself. Let one of its parts be optional."
        )
    if length > MAX_SHORTEST:
        raise ValueError(
            f"{name}: the shortest answer has {length:,} characters, more than {MAX_SHORTEST:,}. Lower minLength and "
            "minItems."
        )


def shortest_answer(schema: dict, parts: list[tuple[str, dict]]) -> float:
    """Return a lower bound of the characters of an answer; infinite if a schema needs itself without end.

    Each `$ref` starts as infinite and gets shorter until nothing changes (Knuth 1977, a generalization of Dijkstra's
    algorithm), in turns from the front and from the back.
    """
    references = list(dict.fromkeys(part["$ref"] for _, part in parts if "$ref" in part))
    lengths = dict.fromkeys(references, math.inf)
    changed = True
    while changed:
        changed = False
        for reference in references:
            new = shortest(target(schema, reference), lengths.__getitem__)
            if new < lengths[reference]:
                lengths[reference], changed = new, True
        references.reverse()
    return shortest(schema, lengths.__getitem__)


def shortest(schema: dict | bool, of: Callable[[str], float]) -> float:
    """Return a lower bound of the characters of a value; `of` returns that of a `$ref`."""
    if isinstance(schema, bool):
        return 1 if schema else math.inf
    bounds = [1]
    if "$ref" in schema:
        bounds.append(of(schema["$ref"]))
    if "const" in schema:
        bounds.append(len(json.dumps(schema["const"], ensure_ascii=False)))
    if "enum" in schema:
        bounds.append(min((len(json.dumps(v, ensure_ascii=False)) for v in schema["enum"]), default=math.inf))
    bounds += [shortest(part, of) for part in schema.get("allOf", [])]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            bounds.append(min((shortest(part, of) for part in schema[key]), default=math.inf))
    if "type" in schema:
        types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        kinds = {"string": lambda: 2 + schema.get("minLength", 0), "array": lambda: shortest_array(schema, of)}
        kinds |= {"object": lambda: shortest_object(schema, of)}
        bounds.append(min((kinds.get(kind, lambda: 1)() for kind in types), default=math.inf))
    return max(bounds)


def shortest_array(schema: dict, of: Callable[[str], float]) -> float:
    """Return a lower bound of the characters of an array."""
    least, first = schema.get("minItems", 0), schema.get("prefixItems", [])
    length = 2 + 2 * max(0, least - 1) + sum(shortest(part, of) for part in first[:least])
    if rest := max(0, least - len(first)):
        length += rest * shortest(schema.get("items", True), of)
    return length


def shortest_object(schema: dict, of: Callable[[str], float]) -> float:
    """Return a lower bound of the characters of an object."""
    known, other = schema.get("properties", {}), schema.get("additionalProperties", True)
    return 2 + sum(len(key) + 4 + shortest(known.get(key, other), of) for key in schema.get("required", []))


def check_grammar(grammar: str, name: str) -> None:
    """Refuse what llguidance refuses, above all schemas that no value fits."""
    from llguidance import LLMatcher

    failed, [*lines] = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise ValueError(f"{name}: {first_line(lines[0])}. Correct the schema.")


def first_line(message: str) -> str:
    """Return the words of an error of llguidance, without the state that it prints behind them."""
    return " ".join(message.partition("<state>")[0].split())[:300].rstrip(".")


def rehearse(grammar: str, patterns: list[str], name: str) -> None:
    """Walk through random answers, to find before the model is loaded that a grammar is too costly to follow.

    A pattern as `(.{0,20}a.{0,20}b){20}` compiles in no time, and its automaton explodes after some letters.
    llguidance counts its work at each token and gives up at a limit.
    """
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    words, steps = LLTokenizer(str(TOKENIZER)), REHEARSED // (1 + len(patterns))
    strict = {"log_level": 0, "limits": LLParserLimits(step_lexer_fuel=REHEARSED_WORK)}
    [quote] = words.tokenize_str('"')
    for pattern in patterns:
        alone = json.dumps({"type": "string", "pattern": pattern})
        matcher = LLMatcher(words, LLMatcher.grammar_from_json_schema(alone, overrides=LAYOUT), **strict)
        letters = {words.tokenize_str(letter)[0] for letter in pattern if letter.isalnum()}  # of its many states
        if reason := walk(matcher, steps, letters, {words.eos_token, quote}):
            raise ValueError(f"{name}: the pattern {pattern[:80]!r} is too costly to follow: {reason}. Simplify it.")
    if reason := walk(LLMatcher(words, grammar, **strict), steps, set(), {words.eos_token}):
        raise ValueError(f"{name}: the schema is too costly to follow: {reason}. Use fewer optional properties.")


def walk(matcher, steps: int, first: set[int], last: set[int]) -> str:
    """Follow a grammar by random tokens, some of them first or last; return why llguidance gave up, or nothing."""
    draw = random.Random(0)
    for _ in range(steps):
        allowed = {token for token, bias in enumerate(matcher.compute_logit_bias()) if bias}
        if matcher.is_error():
            return first_line(matcher.get_error())
        if matcher.is_stopped():
            matcher.reset()
            continue
        matcher.consume_token(draw.choice(sorted(allowed & first or allowed - last or allowed)))
    return ""
