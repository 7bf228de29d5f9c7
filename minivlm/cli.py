"""Parse and report as every command does: examples in `--help`, near names for typing errors, one line per mistake.

Standard library only, so that `minivlm --help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import field
from difflib import get_close_matches

DEBUG = "MINIVLM_DEBUG"  # environment variable: 1 shows the traceback of a user's error, too


class UserError(ValueError):
    """A mistake that the user can mend; the message states value, limit and remedy."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the line breaks of the description, and print the default of each option."""


class Parser(argparse.ArgumentParser):
    """Parse arguments; keep the line breaks of the help, and name the nearest option in an error.

    Args:
        doc: docstring of the command. Its first paragraph is the description, the rest is printed after the options.
            None: the keywords say both, as for a subcommand.
    """

    def __init__(self, doc: str | None = None, **options):
        if doc is not None:
            options["description"], _, options["epilog"] = doc.strip().partition("\n\n")
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)
        if options.get("add_help", True):
            self.add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help="Show the traceback of an error."
            )
        self.given: list[str] = []

    def parse_known_args(self, args=None, namespace=None):
        """Parse like argparse, and keep the arguments for an error message."""
        self.given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        """Parse like argparse; an argument that no option takes is an error that names the nearest option."""
        return self.refuse_unknown(*self.parse_known_args(args, namespace))

    def parse_mixed_args(self, args=None):
        """Parse like `parse_args`; options may also stand between arguments that have no name."""
        return self.refuse_unknown(*self.parse_known_intermixed_args(args))

    def refuse_unknown(self, values, unknown: list[str]):
        """Return the values if every argument was taken; else print an error and exit."""
        if unknown:
            self.error(self.describe_unknown(unknown))
        return values

    def error(self, message: str):
        """Print one line, without the usage of all options, and exit with code 2.

        argparse reports a missing argument first; a misspelt option is the likelier mistake.
        """
        known = set(self.option_names())
        unknown = [a for a in self.given if a.startswith("--") and a.partition("=")[0] not in known and a != "--"]
        if unknown and "required" in message:
            message = self.describe_unknown(unknown)
        self.exit(2, f"error: {message}\n")

    def describe_unknown(self, unknown: list[str]) -> str:
        """Return one line that names the arguments that no option takes, and the nearest options."""
        known, hints = list(self.option_names()), []
        for argument in unknown:
            if argument.startswith("-"):
                near = get_close_matches(argument.partition("=")[0], known, n=1)
                hints += [f"did you mean {name}?" for name in near]
        return " ".join([f"unknown arguments: {' '.join(unknown)};", *(hints or ["--help lists the options."])])

    def option_names(self) -> Iterator[str]:
        """Yield the options of this parser and of its subcommands."""
        yield from self._option_string_actions
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser.option_names()


def positive(text: str, least: int = 1) -> int:
    """Return a whole number of `least` or more, as a type of `add_argument`."""
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {least} or more.")
    return int(text)


def option(default, text: str, **metadata):
    """Return a dataclass field with its help text, which carries the unit; a list is copied for each instance."""
    metadata = {"help": text, **metadata}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def run_command(main: Callable[[list[str] | None], object], argv: list[str] | None = None) -> int:
    """Run `main` and return the exit code: 0, or 2 after one line about a mistake that the user can mend.

    Such mistakes are `ValueError`, `OSError`, a loss that is not finite, and an absent package; `--debug` or
    MINIVLM_DEBUG=1 shows their traceback. Other exceptions are faults of the program and keep theirs.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv or os.environ.get(DEBUG, "0") not in ("", "0")
    try:
        main([argument for argument in argv if argument != "--debug"])
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `minivlm preview ... | head` has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more when it flushes
        return 1
    except Exception as error:
        if debug or not is_mistake(error):
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        return 2
    return 0


def is_mistake(error: Exception) -> bool:
    """Return whether the user can mend what `error` reports."""
    absent = isinstance(error, ModuleNotFoundError) and not (error.name or "minivlm").startswith(("minivlm", "tools"))
    return absent or isinstance(error, (ValueError, OSError, FloatingPointError)) or is_validation(error)


def is_validation(error: BaseException) -> bool:
    """Return whether `error` comes from the check of a configuration, which wraps the ValueError of the check."""
    return any(base.__name__ == "StrictDataclassError" for base in type(error).__mro__)


def describe(error: BaseException) -> str:
    """Return the message of an error: value, limit and remedy if it is ours, a library's text folded to one line."""
    if is_validation(error) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ModuleNotFoundError):
        return f"this needs the package {error.name}. Install it: pip install {error.name}"
    if isinstance(error, OSError):
        if error.strerror and error.filename:
            return f"{error.filename}: {error.strerror}."
        return " ".join(str(error).split()) or type(error).__name__
    return str(error) or type(error).__name__
