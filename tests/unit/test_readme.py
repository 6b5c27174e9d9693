"""Both READMEs say the same, and what they name is there."""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from cli.main import app
from shared.config import ServiceSettings

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh-CN.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SERVICES = ("gateway", "scheduler", "predictor", "prefill", "decode", "kvstore", "placer")


def text_of(readme: str) -> str:
    return (ROOT / readme).read_text()


def prose_of(readme: str) -> str:
    """Without the code blocks."""
    return FENCE.sub("", text_of(readme))


def code_of(readme: str) -> list[tuple[str, str]]:
    """Every code block: its language and what is in it."""
    return FENCE.findall(text_of(readme))


def inline_code_of(readme: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose_of(readme))


def commands_of(readme: str) -> Iterator[list[str]]:
    """Every command line: whole lines of code blocks without a language, and inline ones."""
    for language, code in code_of(readme):
        if not language:
            yield from (shlex.split(line) for line in code.splitlines() if line)
    for code in inline_code_of(readme):
        if code.split()[0] in ("banyan", "make", "docker"):
            yield shlex.split(code)


def links_of(readme: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", prose_of(readme))


def options_of(command: object) -> set[str]:
    """The options of a command and of all that is below it."""
    names = {name for param in getattr(command, "params", ()) for name in param.opts}
    for sub in getattr(command, "commands", {}).values():
        names |= options_of(sub)
    return names


# The same in both


def test_both_have_the_same_headings() -> None:
    first, second = (
        [len(marks) for marks in re.findall(r"^(#+) ", prose_of(name), re.MULTILINE)]
        for name in READMES
    )
    assert first == second


def test_both_have_the_same_code() -> None:
    first, second = map(code_of, READMES)
    assert first == second


def test_both_have_tables_of_the_same_size() -> None:
    first, second = (
        [line.count("|") for line in prose_of(name).splitlines() if line.startswith("|")]
        for name in READMES
    )
    assert first == second


def test_both_have_the_same_names_and_links() -> None:
    first, second = (sorted(inline_code_of(name)) for name in READMES)
    assert first == second
    first, second = ([link for link in links_of(name) if link not in READMES] for name in READMES)
    assert first == second


def test_both_have_the_same_figures() -> None:
    """What was measured is copied, never estimated in one of the two."""
    tables = [
        re.search(r"<!-- peers:.*?<!-- /peers -->", text_of(name), re.DOTALL) for name in READMES
    ]
    rows = [
        [row.split("|")[2:] for row in table[0].splitlines() if row.startswith("|")]
        for table in tables
        if table is not None
    ]
    assert len(rows) == 2 and rows[0] == rows[1]


# What is named is there


@pytest.mark.parametrize("readme", READMES)
def test_every_link_leads_to_a_file(readme: str) -> None:
    missing = [link for link in links_of(readme) if not (ROOT / link).exists()]
    assert missing == []


@pytest.mark.parametrize("readme", READMES)
def test_every_path_is_one(readme: str) -> None:
    paths = [
        code for code in inline_code_of(readme) if re.fullmatch(r"[\w.<>-]+(/[\w.<>-]+)+", code)
    ]
    assert paths
    for path in paths:
        names = SERVICES if "<name>" in path else ("",)
        for name in names:
            assert (ROOT / path.replace("<name>", name)).exists(), path


@pytest.mark.parametrize("readme", READMES)
def test_every_command_of_ours_exists_with_its_options(readme: str) -> None:
    root = typer.main.get_command(app)
    found = 0
    for words in commands_of(readme):
        if words[0].endswith("banyan"):
            arguments = words[1:]
        elif words[:3] == ["docker", "compose", "run"]:
            arguments = words[words.index("cli") + 1 :]
        elif words[:2] == ["make", "up"] and len(words) > 2:
            arguments = ["up", *shlex.split(words[2].removeprefix("ARGS="))]
        else:
            continue
        found += 1
        command: object = root
        for word in arguments:
            commands = getattr(command, "commands", {})
            if word in commands:
                command = commands[word]
            elif word.startswith("-"):
                assert word in options_of(root) | {"--help"} | COMPLETION, words
            elif commands:
                pytest.fail(f"{readme}: no command {word} in {words}")
    assert found >= 10


COMPLETION = {"--install-completion", "--show-completion"}


@pytest.mark.parametrize("readme", READMES)
def test_every_option_in_the_text_exists(readme: str) -> None:
    known = options_of(typer.main.get_command(app)) | COMPLETION | {"--help"}
    named = {code for code in inline_code_of(readme) if code.startswith("-")}
    assert named <= known


@pytest.mark.parametrize("readme", READMES)
def test_every_target_of_make_exists(readme: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {words[1] for words in commands_of(readme) if words[0] == "make" and len(words) > 1}
    assert named and named <= targets


@pytest.mark.parametrize("readme", READMES)
def test_every_file_and_service_of_compose_exists(readme: str) -> None:
    services = set(
        re.findall(r"^  ([a-z]+):$", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE)
    )
    found = 0
    for words in commands_of(readme):
        if words[0].startswith("deploy/"):
            assert (ROOT / words[0]).is_file(), words
        if words[0] != "docker":
            continue
        found += 1
        for option, value in pairwise(words):
            if option == "-f":
                assert (ROOT / value).is_file(), words
            if option == "--scale":
                assert value.partition("=")[0] in services, words
            if option == "--rm":
                assert value in services, words
    assert found >= 4


@pytest.mark.parametrize("readme", READMES)
def test_every_variable_is_a_setting(readme: str) -> None:
    known = set(variables_of(typer.main.get_command(app)))
    for service in SERVICES:
        module = import_module(f"services.{service}.config")
        for settings in vars(module).values():
            if isinstance(settings, type) and issubclass(settings, ServiceSettings):
                prefix = f"BANYAN_{service.upper()}_"
                known |= {prefix + name.upper() for name in settings.model_fields}
    known |= {f"BANYAN_{name.upper()}" for name in ServiceSettings.model_fields}
    named = set(re.findall(r"BANYAN_[A-Z_]*[A-Z]", text_of(readme)))
    assert len(named) >= 15
    assert named <= known


def variables_of(command: object) -> Iterator[str]:
    """The variables of a command's options and of all that is below it."""
    for param in getattr(command, "params", ()):
        if isinstance(param.envvar, str):
            yield param.envvar
    for sub in getattr(command, "commands", {}).values():
        yield from variables_of(sub)
