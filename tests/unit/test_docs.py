"""``docs/messages.md`` says what the code says."""

import runpy
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from shared.messages import CODEC, Message, subjects

DOCS = Path(__file__).resolve().parents[2] / "docs"


class Colour(StrEnum):
    """A colour."""

    RED = "red"
    GREEN = "green"


class Point(NamedTuple):
    """Where."""

    x: int
    y: int = 7


@dataclass(frozen=True)
class Style:
    """How."""

    colour: Colour = Colour.RED


class Draw(Message, frozen=True, kw_only=True):
    """Draw with ``style``."""

    points: tuple[Point, ...]
    style: Style | None = None
    names: dict[str, int] = msgspec.field(default_factory=dict)


class Undocumented(Message, frozen=True, kw_only=True):
    pass


SUBJECTS = types.ModuleType("subjects")
SUBJECTS.__doc__ = """Every subject.

==========  ======
subject     kind
==========  ======
``a.<b>``   x | y
==========  ======

After ``it``.
"""


@pytest.fixture
def render() -> Callable[..., str]:
    render: Callable[..., str] = runpy.run_path(str(DOCS / "generate.py"))["render"]
    return render


def test_the_page_is_up_to_date(render: Callable[..., str]) -> None:
    page = (DOCS / "messages.md").read_text()
    assert page == render(CODEC.types, subjects), "run `make docs`"


@pytest.mark.parametrize("message", CODEC.types, ids=lambda message: message.__name__)
def test_every_message_names_its_contract(message: type[Message]) -> None:
    doc = (message.__dict__.get("__doc__") or "").lower()
    is_reply = "delivery: reply" in doc  # repeated with the command that it answers
    for word in ("publisher", "subscriber", "delivery", *([] if is_reply else ["idempoten"])):
        assert word in doc, f"{message.__name__} does not name its {word}"


def test_messages_come_with_their_fields_and_what_those_are_made_of(
    render: Callable[..., str],
) -> None:
    page = render((Draw, Undocumented), SUBJECTS)
    assert "### Draw\n\nDraw with `style`.\n" in page
    assert "| `points` | tuple\\[[Point](#point), …\\] |  |" in page
    assert "| `style` | [Style](#style) or null | `None` |" in page
    assert "| `names` | dict\\[str, int\\] | `{}` |" in page
    assert "### Point\n\nWhere.\n\n| field | type | default |\n" in page
    assert "| `y` | int | `7` |" in page
    assert "| `colour` | [Colour](#colour) | `'red'` |" in page
    assert "A colour.\n\nOne of: `red`, `green`." in page
    assert page.index("### Undocumented") < page.index("### Point")
    assert "wire types" not in page.partition("### Undocumented")[2]


def test_the_subject_table_becomes_markdown(render: Callable[..., str]) -> None:
    page = render((Undocumented,), SUBJECTS)
    table = "| subject | kind |\n| --- | --- |\n| `a.<b>` | x \\| y |\n\nAfter `it`."
    assert table in page


def test_a_module_without_docstrings_gives_a_page(render: Callable[..., str]) -> None:
    assert "### Undocumented" in render((Undocumented,), types.ModuleType("subjects"))
    assert Undocumented.__module__ in sys.modules
