"""Read the options and commands of other programs as ours: the words are in config/synonyms.py."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from lcmdistill.cli._options import SETTINGS, GroupedCommand
from lcmdistill.config import synonyms
from lcmdistill.config.synonyms import normalized
from lcmdistill.utils.errors import UsageError

_OPTION_OF = {key: name for name, key in SETTINGS.items()}
"setting -> its option"


class Command(GroupedCommand):
    """A command that also takes the options of other programs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments after the command."""
        return super().parse_args(ctx, translate(args, self.get_params(ctx), f"lcmdistill {self.name}"))


def translate(arguments: list[str], parameters: Collection[Any], command: str) -> list[str]:
    """Return a command line in which options of other programs are replaced by this command's own.

    Args:
        arguments: The words after the command.
        parameters: The command's parameters.
        command: The command's name, for messages.

    Raises:
        UsageError: A word is known from other programs, and the command has no option of that meaning.
    """
    options = {name: each for each in parameters for name in (*each.opts, *each.secondary_opts)}
    known = {normalized(name): name for name in options if name.startswith("--")}
    words, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*words, argument, *rest]
        name, sign, value = argument.partition("=")
        if not name.startswith("--"):
            words.append(argument)
            continue
        name, sign, value = _translated(name, sign, value, known, rest, command)
        parameter = options.get(name)
        takes_value = parameter is not None and not getattr(parameter, "is_flag", False)
        if takes_value and not sign:  # its value, even if that looks like an option
            value = next(rest, None)
            words += [name] if value is None else [name, _value(name, value)]
        else:
            words.append(f"{name}{sign}{_value(name, value)}")
    return words


def _translated(
    name: str, sign: str, value: str, known: Mapping[str, str], rest: Any, command: str
) -> tuple[str, str, str]:
    """Return an option, "=" or "", and the value behind it."""
    word = normalized(name)
    if word in known:
        return known[word], sign, value
    flag = synonyms.FLAGS.get(word)
    if flag and not sign and normalized(flag[0]) in known:
        return f"--{flag[0]}", "=", flag[1]
    trains = "set" in known
    if trains and word in synonyms.EXPLAINED:
        raise UsageError(f"{command} has no option {name}: {synonyms.EXPLAINED[word]}")
    if not trains:
        meant = synonyms.OPTIONS.get(word, "")
        return known.get(meant, name), sign, value
    setting = synonyms.setting_meant(word, list(_settings())) if _is_exact(word) else None
    if setting in _OPTION_OF and normalized(_OPTION_OF[setting]) not in known:
        raise UsageError(f"{command} has no option {name}, which is for lcmdistill distill-lora")
    if setting in _OPTION_OF:
        return known.get(normalized(_OPTION_OF[setting]), name), sign, value
    if setting is not None:
        value = value or next(rest, "VALUE")
        value = "VALUE" if value.startswith("-") else value
        value = value.lower() if setting in ("optim.optimizer", "optim.lr_scheduler") else value
        raise UsageError(f"{command} has no option {name}; use --set {setting}={value}")
    return name, sign, value


def _is_exact(word: str) -> bool:
    """Return whether a word is in the table, or the name of a setting; anything else is left to the spelling."""
    return word in synonyms.SETTINGS or word in {key.rpartition(".")[2] for key in _settings()} - {"name"}


def _settings() -> list[str]:
    from lcmdistill.config.reference import setting_keys
    from lcmdistill.objectives import OBJECTIVES

    sections = ("optim", "student", "objective", "data", "run", "teacher")
    return [key for section in sections for key in setting_keys(section, OBJECTIVES.locations)]


def _value(option: str, value: str) -> str:
    return synonyms.VALUES.get((normalized(option), value.lower()), value)


def option_meant(word: str, known: Collection[str], *, trains: bool) -> str | None:
    """Return the option that a word means, by meaning first and by spelling second, with underscores; None if unknown."""
    word = normalized(word)
    setting = synonyms.SETTINGS.get(word)
    meant = normalized(_OPTION_OF.get(setting or "", "")) if trains else synonyms.OPTIONS.get(word)
    near = difflib.get_close_matches(word, known, n=1)
    return meant if meant in known else near[0] if near else None


def unknown_command(word: str, commands: Collection[str]) -> UsageError:
    """Return the error for a word that is not a command."""
    near = difflib.get_close_matches(word, commands, n=1)
    meant = synonyms.COMMANDS.get(normalized(word).replace("_", "-")) or (near[0] if near else None)
    hint = f"did you mean {meant}?" if meant else f"choose from {', '.join(commands)}; see lcmdistill --help"
    return UsageError(f"lcmdistill has no command {word!r}; {hint}")
