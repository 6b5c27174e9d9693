"""The pieces of incremental detokenisation add up to the whole decoded text, for any tokens."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from services.gateway.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-chat"
FALLBACK_PIECES = [
    *("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))),
    *("▁", "▁Hello", "▁wor", "ld", "Hello", "!", "é", "▁▁", "\n", "\ufffd", "<0xZZ>"),
]


@cache
def byte_level() -> Tokenizer:
    """The bundled model's, with added tokens of the awkward kinds."""
    backend = Backend.from_file(str(MODEL / "tokenizer.json"))
    backend.add_tokens(["<think>", "你好", "a b", "Ġé€"])
    return Tokenizer(backend)


@cache
def byte_fallback() -> Tokenizer:
    """As SentencePiece models have it: spaces as ▁, unknown characters as bytes."""
    backend = Backend(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(FALLBACK_PIECES)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>", "<unk>")]
    )
    return Tokenizer(backend)


@cache
def metaspace() -> Tokenizer:
    pieces = ["<unk>", "▁", "▁Hello", "▁world", "!", "a▁b", "é", "x"]
    backend = Backend(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>")
    )
    backend.decoder = decoders.Metaspace()
    return Tokenizer(backend)


def incremental(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    return "".join([*map(detokenizer.feed, token_ids), detokenizer.flush()])


@given(token_ids=st.lists(st.integers(0, 8200), max_size=60))
def test_byte_level_pieces_of_any_tokens_are_the_whole_text(token_ids: list[int]) -> None:
    assert incremental(byte_level(), token_ids) == byte_level().decode(token_ids)


@given(token_ids=st.lists(st.integers(6, 262) | st.integers(8192, 8196), max_size=40))
def test_byte_level_pieces_of_lone_bytes_are_the_whole_text(token_ids: list[int]) -> None:
    """Ids below 262 are the 256 bytes: mostly invalid UTF-8, and what becomes of it is fixed."""
    assert incremental(byte_level(), token_ids) == byte_level().decode(token_ids)


@given(text=st.text(max_size=80))
def test_byte_level_text_survives_encoding_and_incremental_decoding(text: str) -> None:
    token_ids = byte_level().encode_now(text, add_special_tokens=False)
    shown = incremental(byte_level(), token_ids)
    assert shown == byte_level().decode(token_ids)
    if "<|" not in text:  # special tokens written out in the text are not shown
        assert shown == text


@given(token_ids=st.lists(st.integers(0, 272), max_size=40))
def test_byte_fallback_pieces_of_any_tokens_are_the_whole_text(token_ids: list[int]) -> None:
    assert incremental(byte_fallback(), token_ids) == byte_fallback().decode(token_ids)


@given(text=st.text(alphabet="Hello wrd!é\n語😀\ufffd", max_size=40))
def test_byte_fallback_text_survives_encoding_and_incremental_decoding(text: str) -> None:
    token_ids = byte_fallback().encode_now(text, add_special_tokens=False)
    assert incremental(byte_fallback(), token_ids) == byte_fallback().decode(token_ids)


@given(token_ids=st.lists(st.integers(0, 8), max_size=20))
def test_metaspace_pieces_of_any_tokens_are_the_whole_text(token_ids: list[int]) -> None:
    assert incremental(metaspace(), token_ids) == metaspace().decode(token_ids)


def test_a_character_is_shown_when_its_last_byte_has_come() -> None:
    tokenizer = byte_level()
    token_ids = tokenizer.encode_now("😀", add_special_tokens=False)
    assert len(token_ids) > 1
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.feed(token_id) for token_id in token_ids]
    assert pieces == [""] * (len(token_ids) - 1) + ["😀"]
    assert detokenizer.flush() == ""


def test_a_space_that_only_begins_a_text_is_not_lost_in_the_middle() -> None:
    detokenizer = byte_fallback().detokenizer()
    names = ["▁Hello", "<s>", "▁wor", "ld"]
    pieces = [detokenizer.feed(FALLBACK_PIECES.index(name)) for name in names]
    assert pieces == ["Hello", "", " wor", "ld"]


def test_what_breaks_off_inside_a_character_is_flushed_as_the_whole_decoding_shows_it() -> None:
    for tokenizer in (byte_level(), byte_fallback()):
        token_ids = tokenizer.encode_now("a😀", add_special_tokens=False)[:-1]
        assert incremental(tokenizer, token_ids) == tokenizer.decode(token_ids)


def test_special_tokens_are_not_shown() -> None:
    tokenizer = byte_level()
    token_ids = tokenizer.encode_now("<|user|>hi<|end|>", add_special_tokens=False)
    assert incremental(tokenizer, token_ids) == "hi"
