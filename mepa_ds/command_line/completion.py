"""Scripts by which a shell completes the words of a command line, made from the help texts of all its commands."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import Literal

Shell = Literal["bash", "zsh", "fish"]
HelpOf = Callable[[list[str]], object]
"""Runs a command with its words; it prints its help and ends, as `--help` does."""

_CHOICES = re.compile(r"(?<!\S)\[*(?:(?P<option>-[\w-]+) )?\{(?P<words>[\w.,-]+)\}(?!\|)")
_OPTION = re.compile(r"(?m)^[│\s]*(?:-\w,? )?(--[a-z][\w-]*)(?:, (--[a-z][\w-]*))?")


@dataclass
class Words:
    """What may follow: sub-commands (or words that stand in their place), and options."""

    commands: dict[str, Words] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    def walk(self, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Words]]:
        """Yields the words after each sequence of sub-commands."""
        yield path, self
        for name, words in self.commands.items():
            yield from words.walk((*path, name))


def words_of(run: HelpOf, groups: Mapping[str, Mapping[str, object]], names: Mapping[str, object]) -> Words:
    """Returns the words of a program whose commands are `names`. `groups`: sub-commands of those that list their own.

    A command whose help cannot be had completes to nothing.
    """
    return Words({name: _words(run, [name], groups, "") for name in names}, ("--help", "--version"))


def _words(run: HelpOf, path: list[str], groups: Mapping[str, Mapping[str, object]], above: str) -> Words:
    if len(path) == 1 and path[0] in groups:
        return Words({name: _words(run, [*path, name], groups, "") for name in groups[path[0]]}, ("--help",))
    text = _help(run, path)
    usage = " ".join(text.partition("\n\n")[0].split())
    options = dict.fromkeys(name for pair in _OPTION.findall(text) for name in pair if name)
    found = Words(options=tuple(dict.fromkeys((*options, "--help"))))
    if usage and usage != above:
        for choice in _CHOICES.finditer(usage):
            if not choice["option"]:
                for name in choice["words"].split(","):
                    found.commands[name] = _words(run, [*path, name], groups, usage)
    return found


def _help(run: HelpOf, path: list[str]) -> str:
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(io.StringIO()), suppress(SystemExit, Exception):
        run([*path, "--help"])
    return output.getvalue()


def script(shell: Shell, program: str, words: Words) -> str:
    """Returns the script; the shell evaluates it or reads it from where it looks for such files."""
    if shell == "fish":
        return _fish(program, words)
    text = _bash(program, words)
    return f"autoload -U +X bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text


def _bash(program: str, words: Words) -> str:
    cases = "\n".join(
        f'        "{" ".join(path)}") commands="{" ".join(after.commands)}"; options="{" ".join(after.options)}" ;;'
        for path, after in words.walk()
    )
    return f"""# Completion of {program} for bash, written by `{program} completion bash`.
_{program}_words() {{
    case "$1" in
{cases}
        *) commands=""; options="" ;;
    esac
}}
_{program}() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" path="" commands="" options="" word number
    _{program}_words ""
    for ((number = 1; number < COMP_CWORD; number++)); do
        word="${{COMP_WORDS[number]}}"
        if [[ "$word" != -* && " $commands " == *" $word "* ]]; then
            path="${{path:+$path }}$word"
            _{program}_words "$path"
        fi
    done
    if [[ "$current" == -* ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$current"))
    else
        COMPREPLY=($(compgen -W "$commands" -- "$current"))
    fi
}}
complete -o default -F _{program} {program}
"""


def _fish(program: str, words: Words) -> str:
    lines = [
        f"# Completion of {program} for fish, written by `{program} completion fish`.",
        f"function __{program}_after",
        "    set -l words (commandline -opc)",
        "    set -l plain",
        "    for word in $words[2..-1]",
        "        string match -q -- '-*' $word; or set -a plain $word",
        "    end",
        '    test (string join " " $plain[1..(count $argv)]) = (string join " " $argv); or return 1',
        "    test (count $plain) -eq (count $argv); or string match -q -- '-*' (commandline -ct)",
        "end",
    ]
    for path, after in words.walk():
        where = f'-n "__{program}_after {" ".join(path)}"'
        if after.commands:
            lines.append(f"complete -c {program} {where} -a '{' '.join(after.commands)}'")
        lines += [f"complete -c {program} {where} -l {option[2:]}" for option in after.options]
    return "\n".join(lines) + "\n"
