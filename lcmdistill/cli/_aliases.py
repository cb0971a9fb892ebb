"""Read the options and commands of other programs as ours: the words are in config/synonyms.py and config/explained.py."""

import re
from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Any, Literal, get_args, get_origin

from typer.core import TyperGroup

from lcmdistill.cli._options import SETTINGS, GroupedCommand, option_type
from lcmdistill.config import explained, synonyms
from lcmdistill.config.synonyms import normalized
from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.spelling import near_words, or_list

_OPTION_OF = {key: name for name, key in SETTINGS.items()}
"setting -> its option"


class Command(GroupedCommand):
    """A command that also takes the options of other programs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments after the command."""
        return super().parse_args(ctx, translate(args, self.get_params(ctx), _path(ctx)))


class Commands(TyperGroup):
    """A group of commands. A word of other programs, such as train, is answered with the command of that meaning."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the group."""
        own = {name for each in self.get_params(ctx) for name in (*each.opts, *each.secondary_opts)}
        if ctx.parent is None and args and args[0].startswith("-") and args[0].partition("=")[0] not in own:
            raise UsageError(f"the command comes first: lcmdistill distill {args[0]} ...; see lcmdistill --help")
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the first argument names."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            shown = [name for name, each in self.commands.items() if not each.hidden]
            raise unknown_command(args[0], shown, group=_path(ctx) if ctx.parent else "lcmdistill")
        return super().resolve_command(ctx, args)


def _path(context: Any) -> str:
    """Return the words that name a command, such as "lcmdistill cache clear"."""
    names = []
    while context.parent is not None:
        names.append(context.info_name)
        context = context.parent
    return " ".join(["lcmdistill", *reversed(names or [context.info_name])])


def translate(arguments: list[str], parameters: Collection[Any], command: str) -> list[str]:
    """Return a command line in which options of other programs are replaced by this command's own.

    Args:
        arguments: The words after the command.
        parameters: The command's parameters.
        command: The command's name, for messages.

    Raises:
        UsageError: An option, a value or a word is not for this command; the message states what to use instead.
    """
    options = {name: each for each in parameters for name in (*each.opts, *each.secondary_opts)}
    known = {normalized(name): name for name in options if name.startswith("--")}
    takes_words = any(each.param_type_name == "argument" for each in parameters)
    words, positional, rest = [], list[str](), iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*words, argument, *rest]
        name, sign, value = argument.partition("=")
        if not re.match("--.|-[a-zA-Z]$", name):
            if not takes_words and not name.startswith("-"):
                raise UsageError(f"{command} takes no argument {argument!r}; {_option_for(argument, known)}")
            words.append(argument)
            _check_no_prompt([*positional, argument], known, command)
            positional.append(argument)
            continue
        if name not in options:
            name, sign, value = _translated(name, sign, value, known, rest, command)
        parameter = options.get(name)
        takes_value = parameter is not None and not getattr(parameter, "is_flag", False)
        if takes_value and not sign:
            value = next(rest, None)
            if value is None:
                raise UsageError(f"option {name} requires a value; see {command} --help")
            if value.startswith("--") and _is_option(value, known):
                raise UsageError(
                    f"option {name} requires a value, got the option {value}; if that is the value, use {name}={value}"
                )
            words += [name, _value(name, value, known, command)]
        else:
            words.append(f"{name}{sign}{_value(name, value, known, command)}")
    return words


def _translated(
    name: str, sign: str, value: str, known: Mapping[str, str], rest: Any, command: str
) -> tuple[str, str, str]:
    """Return an option, "=" or "", and the value behind it."""
    word, trains = normalized(name), "set" in known
    if word in known and name.startswith("--"):
        return known[word], sign, value
    if word in synonyms.FLAGS and not sign:
        option, meant = synonyms.FLAGS[word]
        if option := known.get(option) or known.get(synonyms.OPTIONS.get(option, "")):
            return option, "=", meant
    if not trains and synonyms.OPTIONS.get(word) in known:
        return known[synonyms.OPTIONS[word]], sign, value
    if text := _explanation(word, trains=trains):
        raise UsageError(f"{command} has no option {name}: {text}")
    setting = synonyms.setting_meant(word, list(_settings())) if trains and _is_exact(word) else None
    option = _OPTION_OF.get(setting or "")
    if option and normalized(option) in known:
        return known[normalized(option)], sign, value
    if option:
        raise UsageError(f"{command} has no option {name}, which is for lcmdistill distill-lora")
    if setting is not None:
        value = value or next(rest, "")
        raise UsageError(f"{command} has no option {name}; use --set {setting}={_setting_value(setting, value)}")
    near = options_meant(word, known, trains=trains)
    hint = f"did you mean {or_list(known[each] for each in near)}?" if near else f"see {command} --help"
    raise UsageError(f"{command} has no option {name}; {hint}")


def _is_option(word: str, known: Mapping[str, str]) -> bool:
    """Return whether a word is an option, in ours or in another program's words."""
    word = normalized(word.partition("=")[0])
    return word in known or word in synonyms.FLAGS or _is_exact(word) or bool(_explanation(word, trains=True))


def _explanation(word: str, *, trains: bool) -> str | None:
    """Return what to do in place of a word that has no option; None for another word."""
    return explained.EVERYWHERE.get(word) or (explained.TRAINING if trains else explained.ELSEWHERE).get(word)


def _is_exact(word: str) -> bool:
    """Return whether a word is in the table, or the name of a setting; anything else is left to the spelling."""
    return word in synonyms.SETTINGS or word in {key.rpartition(".")[2] for key in _settings()} - {"name"}


def _settings() -> list[str]:
    from lcmdistill.config.reference import setting_keys
    from lcmdistill.objectives import OBJECTIVES

    sections = ("optim", "student", "objective", "data", "run", "teacher")
    return [key for section in sections for key in setting_keys(section, OBJECTIVES.locations)]


def _setting_value(setting: str, value: str) -> str:
    """Return a value for --set from what another program's option was given, or what the setting allows."""
    kinds = () if setting.startswith("objective.") else get_args(option_type(setting))
    if bool in kinds:
        return value.lower() if value.lower() in ("true", "false") else "true"
    choices = [each for kind in kinds for each in (get_args(kind) if get_origin(kind) is Literal else ())]
    choices += [str(each) for kind in kinds if isinstance(kind, type) and issubclass(kind, StrEnum) for each in kind]
    if choices:
        return value.lower() if value.lower() in choices else or_list(choices)
    return "VALUE" if not value or value.startswith("-") else value


def _value(name: str, value: str, known: Mapping[str, str], command: str) -> str:
    """Return an option's value as the option spells it.

    Raises:
        UsageError: The value is one of other programs', and means none of ours.
    """
    option = normalized(name), value.lower()
    if text := explained.VALUES.get(option):
        raise UsageError(f"{name} {value} is not a choice of {command}: {text}")
    if option[0] == "resolution" and (sides := re.fullmatch(r"(\d+) ?[,x*] ?(\d+)", value)):
        width, height = sides.groups()
        if width == height:
            return width
        use = f"--width {width} --height {height}" if "width" in known else f"--buckets {height}x{width}"
        raise UsageError(f"{name} {value} is not a square; use {use}, or one number")
    return synonyms.VALUES.get(option, value)


def _check_no_prompt(arguments: list[str], known: Collection[str], command: str) -> None:
    """Raise UsageError if words without an option are a prompt: several, or one with spaces that names no file or run."""
    from lcmdistill.utils.run_names import run_path

    if "prompt" not in known:
        return
    text = " ".join(arguments)
    if len(arguments) > 1:
        raise UsageError(
            f"{command} takes one MODEL, got {' and '.join(map(repr, arguments))}; a prompt is --prompt TEXT, in quotes"
        )
    if " " in text and not run_path(text).exists():
        raise UsageError(f"there is no model {text!r}; if it is a prompt, use --prompt {text!r}")


def _option_for(word: str, known: Mapping[str, str]) -> str:
    """Return what a word without an option in front of it was meant for, as part of a message."""
    from lcmdistill.teachers.naming import ALIASES
    from lcmdistill.utils.run_names import run_path

    if not {"teacher", "data"} <= known.keys():
        return "see --help for its options"
    path = run_path(word)
    is_model = word in ALIASES or path.suffix in (".safetensors", ".ckpt") or (path / "model_index.json").is_file()
    if is_model or (path / "config.toml").is_file() or (word.count("/") == 1 and not path.exists()):
        return f"use --teacher {word}"
    if path.suffix == ".toml":
        return f"use --config {word}"
    if path.is_dir() or path.suffix == ".tar":
        return f"use --data {word}"
    near = near_words(word, ALIASES)
    return f"use --teacher {near[0]}" if near else "the teacher is --teacher MODEL, and your images are --data FOLDER"


def options_meant(word: str, known: Collection[str], *, trains: bool) -> list[str]:
    """Return the options that a word may mean, with underscores: by meaning first, and by spelling second."""
    settings = {each: normalized(_OPTION_OF.get(setting, "")) for each, setting in synonyms.SETTINGS.items()}
    words = dict(zip(known, known, strict=True)) | (settings if trains else synonyms.OPTIONS)
    meant = words.get(normalized(word))
    candidates = [meant] if meant else [words[each] for each in near_words(word, words, 3)]
    return [each for each in dict.fromkeys(candidates) if each in known]


def unknown_command(word: str, commands: Collection[str], *, group: str = "lcmdistill") -> UsageError:
    """Return the error for a word that is not a command of the program, or of one of its groups, such as lcmdistill runs."""
    from lcmdistill.teachers.naming import ALIASES

    meant = synonyms.SUBCOMMANDS.get(group.partition(" ")[2], synonyms.COMMANDS)
    words = {**meant, **{each: each for each in commands}}
    name = normalized(word).replace("_", "-")
    near = [name] if name in words else near_words(word, words)
    hint = f"did you mean {words[near[0]]}?" if near else f"choose from {', '.join(commands)}; see {group} --help"
    if group == "lcmdistill" and not near and (word in ALIASES or word.endswith(".safetensors")):
        hint = f"did you mean distill --teacher {word}, or sample {word}?"
    return UsageError(f"{group} has no command {word!r}; {hint}")
