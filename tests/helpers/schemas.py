"""Make JSON Schemas by a seed: objects, arrays, enums, bounded numbers, patterns, Chinese, choices, recursion."""

import random

WORDS = ["pig face", "猪脸", "blue square", "颜色", 'a"b\\c', "🐷", ""]
PATTERNS = [
    "^[A-Z]{2}-[0-9]{3}$",
    "^#[0-9a-f]{6}$",
    "^[一-龥]{1,4}$",
    "^(yes|no|是|否)$",
    "^\\w+@\\w+\\.(com|cn)$",
    "^a?b?c?$",
]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4"]
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "值": {"type": "integer", "minimum": 0, "maximum": 99},
                "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
            },
            "required": ["值"],
        }
    },
    "$ref": "#/$defs/node",
}


def scalar(draw: random.Random) -> dict:
    low = draw.randint(-50, 50)
    high = low + draw.randint(1, 200)
    return draw.choice([
        {"type": "string", "maxLength": draw.randint(0, 12)},
        {"type": "string", "minLength": 2, "maxLength": draw.randint(2, 6), "description": "两个字以上"},
        {"type": "string", "pattern": draw.choice(PATTERNS)} | {"maxLength": 16},
        {"type": "string", "format": draw.choice(FORMATS)},
        {"enum": draw.sample([*WORDS, 1, None, True, {"a": ["b"]}], draw.randint(1, 5))},
        {"const": draw.choice(WORDS)},
        {"type": "integer", "minimum": low, "maximum": high},
        {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 2, "multipleOf": 1},
        {"type": "number", "minimum": low / 8, "maximum": high / 8},
        {"type": "integer", "minimum": 0, "maximum": 700, "multipleOf": 7},
        {"type": "boolean"},
        {"type": ["null", "boolean"]},
    ])  # fmt: skip


def make_schema(seed: int, depth: int = 3) -> dict:
    """Return a schema whose answers have an end within some 300 tokens, and mostly within 60."""
    draw = random.Random(seed)
    return TREE if seed % 25 == 24 else value(draw, depth)


def value(draw: random.Random, depth: int) -> dict:
    kind = draw.choice(["object", "object", "array", "tuple", "choice", "scalar"]) if depth else "scalar"
    if kind == "object":
        names = draw.sample(
            ["name", "名称", "kind", "a b", 'x"y', "类别", "count", "properties", "const"], draw.randint(1, 4)
        )
        required = [name for name in names if draw.random() < 0.8]
        schema = {
            "type": "object",
            "properties": {name: value(draw, depth - 1) for name in names},
            "required": required,
        }
        return schema | draw.choice([{}, {"additionalProperties": False}])
    if kind == "array":
        least = draw.randint(0, 2)
        return {
            "type": "array",
            "items": value(draw, depth - 1),
            "minItems": least,
            "maxItems": least + draw.randint(0, 1),
        }
    if kind == "tuple":
        parts = [value(draw, 0) for _ in range(draw.randint(1, 3))]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    if kind == "choice":
        return {"anyOf": [value(draw, depth - 1), scalar(draw)], "title": "either"}
    return scalar(draw)
