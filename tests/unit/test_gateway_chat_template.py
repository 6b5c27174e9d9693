"""Chat templates render as in transformers, and cannot do harm."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.gateway.chat_template import ChatTemplate
from services.gateway.served_model import ServedModel
from services.gateway.tokenizer import Tokenizer
from shared.errors import ConfigError, InvalidRequest

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-chat"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>hi</b> & 'you'\n"},
    {"role": "assistant", "content": " hello "},
    {"role": "user", "content": "日本語?"},
]
TEMPLATES = [
    (MODEL / "chat_template.jinja").read_text(),
    "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content }}]\n"
    "  {% else %}\n{{ m['content'] | trim }}{{ eos_token }}\n  {% endif %}\n{% endfor %}",
    "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
    "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}"
    "{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ tools is none }}{{ documents is none }}{{ mood }}{{ dict(a=1) }}",
]


def template(source: str, **kwargs: Any) -> ChatTemplate:
    return ChatTemplate(source, special_tokens={"bos_token": "<|bos|>"}, **kwargs)


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_renders_as_transformers_does(
    tmp_path: Path, source: str, add_generation_prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text(source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_model_dir(tmp_path)
    ours = ChatTemplate.from_model_dir(tmp_path, special_tokens=tokenizer.special_tokens)
    assert ours is not None
    expected = theirs.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=add_generation_prompt, mood="good"
    )
    rendered = ours.render(
        CHAT, add_generation_prompt=add_generation_prompt, variables={"mood": "good"}
    )
    assert rendered == expected


def test_the_date_is_the_one_that_was_given() -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    rendered = template(source, now=lambda: datetime(2031, 5, 17, tzinfo=UTC)).render(CHAT)
    assert rendered == "17 May 2031"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nope.nope }}", "nope"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ range(10 ** 9) | list }}", "[Rr]ange"),
    ],
)
def test_a_template_that_fails_is_the_messages_fault(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        template(source).render(CHAT)
    assert caught.value.field == "messages"


@pytest.mark.parametrize("name", ["messages", "bos_token", "add_generation_prompt", "tools"])
def test_what_the_server_sets_cannot_be_overridden(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        template("x").render(CHAT, variables={name: "y"})
    assert caught.value.field == f"chat_template_kwargs.{name}"


def test_a_developer_is_the_system_where_the_template_does_not_know_one() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert template("{{ messages[0].role }}").render(messages) == "system"
    knowing = template("{# developer #}{{ messages[0].role }}")
    assert knowing.render(messages) == "developer"


def test_the_file_comes_before_the_configuration_and_default_before_other_names(
    tmp_path: Path,
) -> None:
    def rendered() -> str | None:
        found = ChatTemplate.from_model_dir(tmp_path, special_tokens={})
        return None if found is None else found.render(CHAT)

    config = tmp_path / "tokenizer_config.json"
    assert rendered() is None
    config.write_text(json.dumps({"chat_template": [{"name": "rag", "template": "rag"}]}))
    assert rendered() is None
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "named"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert rendered() == "named"
    config.write_text(json.dumps({"chat_template": "plain"}))
    assert rendered() == "plain"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert rendered() == "file"


def test_a_template_that_is_none_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja"):
        ChatTemplate.from_model_dir(tmp_path, special_tokens={})


def test_a_served_model_reads_its_limits_and_may_be_given_a_shorter_context() -> None:
    model = ServedModel.from_model_dir(MODEL, name="tiny")
    assert (model.max_model_len, model.vocab_size) == (8192, 8192)
    assert model.chat_template is not None
    assert ServedModel.from_model_dir(MODEL, name="t", max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match="max_position_embeddings is 8192"):
        ServedModel.from_model_dir(MODEL, name="t", max_model_len=8193)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ServedModel.from_model_dir(MODEL.parent, name="t")
