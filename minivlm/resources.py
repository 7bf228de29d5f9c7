"""Find the files that the package carries: tokenizer and chat template of new models, recipes, launch configurations,
the page of `convert to_web`.

In a checkout `recipes/`, `configs/` and `web/` stand at the root, in a wheel inside the package; each has one home in
git.
Standard library only.
"""

import hashlib
from difflib import get_close_matches
from pathlib import Path

PACKAGE = Path(__file__).parent
HUB_MODEL = "jinv2/minivlm"  # our release: model and data are one tree
FONT = PACKAGE / "assets" / "MiniVLMSans-Regular.ttf"  # has the Chinese characters of the embedded data
ASSETS = PACKAGE / "assets"  # tokenizer.json, tokenizer_config.json, chat_template.jinja


def shipped(folder: str) -> Path:
    """Return the folder `recipes`, `configs` or `web`, wherever this installation has it."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


def default_model() -> str:
    """Return the model of a command that names none: this folder's, that of the checkout, or the one on the Hub."""
    for folder in (Path("."), PACKAGE.parent):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return str(folder)
    return HUB_MODEL


def digest(path: Path) -> str:
    """Return the SHA-256 of a file of weights, by which a record of results names them."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


RECIPES, CONFIGS, WEB = shipped("recipes"), shipped("configs"), shipped("web")


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with MiniVLM, without `.yaml`."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe.

    Args:
        name: path of a YAML file, or the bare name of a recipe that comes with MiniVLM, with or without `.yaml`.

    Raises:
        ValueError: there is no such file. The message names the nearest recipe and lists all of them.
    """
    path = Path(name)
    if path.is_file():
        return path
    # `recipes/micro.yaml` means the shipped recipe also where there is no folder `recipes`.
    bare = path.parent in (Path(), Path("recipes")) and path.suffix in ("", ".yaml")
    known = recipe_names()
    if bare and path.stem in known:
        return RECIPES / f"{path.stem}.yaml"
    near = get_close_matches(path.stem, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"--recipe {name}: no such file or recipe.{hint} Recipes are {', '.join(known)}.")
