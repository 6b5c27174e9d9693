"""The tokenizer does what transformers' does with the same files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from services.gateway.tokenizer import THREAD_FROM_CHARS, Tokenizer
from shared.errors import ConfigError

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-chat"
TEXTS = ["", "Hello, world!", "  two  spaces\n", "日本語 😀 naïve", "<|user|>\nhi<|end|>"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model's tokenizer, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL / name, tmp_path / name)
    return tmp_path


def configure(model: Path, **changes: Any) -> None:
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def add_bos(model: Path) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|bos|>", "type_id": 0}})
    content["post_processor"]["special_tokens"] = {
        "<|bos|>": {"id": "<|bos|>", "ids": [1], "tokens": ["<|bos|>"]}
    }
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("has_bos", "changes"),
    [
        (False, {}),
        (True, {}),
        (False, {"add_bos_token": True, "add_eos_token": True}),
        (True, {"add_bos_token": False}),
        (True, {"eos_token": {"__type": "AddedToken", "content": "<|end|>"}}),
        (True, {"extra_special_tokens": None, "additional_special_tokens": ["<|user|>"]}),
    ],
)
def test_encodes_and_decodes_as_transformers_does(
    model: Path, has_bos: bool, changes: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    configure(model, **changes)
    if has_bos:
        add_bos(model)
    ours = Tokenizer.from_model_dir(model)
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    for text in TEXTS:
        for add in (True, False):
            expected = theirs(text, add_special_tokens=add)["input_ids"]
            assert ours.encode_now(text, add_special_tokens=add) == expected
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


async def test_long_text_gives_the_same_ids_as_short_pieces_of_it() -> None:
    tokenizer = Tokenizer.from_model_dir(MODEL)
    line = "The quick brown fox.\n"
    text = line * (2 * THREAD_FROM_CHARS // len(line))
    ids = await tokenizer.encode(text, add_special_tokens=True)
    assert ids == tokenizer.encode_now(text, add_special_tokens=True)
    assert tokenizer.decode(ids) == text


def test_token_bytes_of_an_output_are_its_utf8() -> None:
    tokenizer = Tokenizer.from_model_dir(MODEL)
    text = "naïve 日本語 😀 text\n"
    ids = tokenizer.encode_now(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_a_token_that_is_no_whole_text_is_written_as_bytes() -> None:
    tokenizer = Tokenizer.from_model_dir(MODEL)
    ids = tokenizer.encode_now("😀", add_special_tokens=False)
    assert tokenizer.token_text(ids[0]).startswith("bytes:\\xf0")
    assert tokenizer.token_text(2) == "<|end|>"


def test_a_token_id_without_a_token_has_no_text() -> None:
    tokenizer = Tokenizer.from_model_dir(MODEL)
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.decode([10**6]) == ""
    assert tokenizer.detokenizer().feed(10**6) == ""


def test_tokens_the_configuration_calls_special_are_not_shown(model: Path) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] != "<|user|>"
    file.write_text(json.dumps(content))
    assert Tokenizer.from_model_dir(model).decode([3]) == ""
    configure(model, extra_special_tokens=[])
    assert Tokenizer.from_model_dir(model).decode([3]) == "<|user|>"


def test_a_lower_bound_of_tokens_never_exceeds_their_number() -> None:
    tokenizer = Tokenizer.from_model_dir(MODEL)
    for text in [*TEXTS, " " * 5000, "information " * 500]:
        assert tokenizer.min_tokens(text) <= len(
            tokenizer.encode_now(text, add_special_tokens=False)
        )
    assert tokenizer.min_tokens("x" * 10**6) > 8192


def test_truncation_in_the_file_is_not_applied(model: Path) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    file.write_text(json.dumps(content))
    ids = Tokenizer.from_model_dir(model).encode_now("one two three", add_special_tokens=True)
    assert len(ids) > 2


@pytest.mark.parametrize("content", [None, "{", '{"model": 5}'])
def test_a_model_without_a_readable_tokenizer_is_a_configuration_error(
    model: Path, content: str | None
) -> None:
    file = model / "tokenizer.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_model_dir(model)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_tokenizer_config_is_a_configuration_error(model: Path, content: str) -> None:
    (model / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer.from_model_dir(model)
