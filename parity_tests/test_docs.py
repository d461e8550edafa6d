"""README and docs: every command parses, every link resolves, the README takes two minutes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from parity_tests.helpers.paths import ROOT
from porting.cli.main import COMMANDS, PROGRAM, Command, parse

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MOST_WORDS = 700  # of the README
LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")
SCRIPTS = {f"tools/{command.script}": command for command in COMMANDS.values()}


def commands(page: Path) -> list[list[str]]:
    """The words of every command of this project in a code block or between backquotes."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = []
    for line in lines:
        if re.match(
            r"(python tools/|torchrun|pytest |efficientdet-porting [a-z]+ |python -m parity_tests)", line
        ):
            found.append(shlex.split(line.partition("  #")[0]))
    return found


def program(words: list[str]) -> tuple[Command, list[str]] | None:
    """The command that these words run, and its arguments; None for pytest and modules."""
    if words[0] == PROGRAM:
        return COMMANDS[words[1]], words[2:]
    for place, word in enumerate(words[:4]):
        if word in SCRIPTS:
            return SCRIPTS[word], words[place + 1 :]
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in commands(page):
        found = program(words)
        if found is None:
            missing = [word for word in words if "/" in word and not _exists(word)]
            assert words[0] != "python" or words[1] == "-m", words
            assert not missing, f"{words}: {missing} does not exist"
        elif "…" not in words:
            try:
                parse(*found)
            except SystemExit:
                pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")


def _exists(word: str) -> bool:
    """A test or a module; what a user brings (``path/to/…``) need not exist."""
    return word.startswith("path/to/") or (ROOT / word.partition("::")[0]).exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page: Path) -> None:
    for target, _ in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_commands_are_found() -> None:
    """This file's own reading of the pages: it must not pass because it finds nothing."""
    assert sum(len(commands(page)) for page in PAGES) > 60
    assert {found[0].name for page in PAGES for words in commands(page) if (found := program(words))} == set(
        COMMANDS
    )


def test_the_readme_takes_two_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_every_test_file_that_is_named_exists() -> None:
    for page in PAGES:
        for name in re.findall(r"parity_tests/[\w/]+\.py", page.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"
