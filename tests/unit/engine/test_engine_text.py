"""Streamed text against the tokenizer's decoding of the complete answer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine import model_of, request_for, row_for, run
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fmray.engine.engine import Engine
from fmray.engine.tokens import TextStream


def byte_level() -> PreTrainedTokenizerFast:
    """One token per byte, as in GPT-2 and Qwen, a few words, and an end token."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, extra = {}, 0
    for byte in range(256):
        if byte in printable:
            letters[byte] = chr(byte)
        else:
            letters[byte] = chr(256 + extra)
            extra += 1
    vocabulary = {letters[byte]: byte for byte in range(256)}
    for word in ("he", "Ġworld", "\u00e4\u00bd"):  # the last: two of the three bytes of 你
        vocabulary[word] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, merges=[]))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """Pieces with a leading space and byte fallback, as in Llama."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for word in ("▁", "▁a", "b", "▁cat", "s", ".", "▁▁"):
        vocabulary[word] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary, merges=[], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


BYTES, PIECES = byte_level(), sentence_piece()


def stream(tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    text = TextStream(tokenizer, stop)
    shown = []
    for token in ids:
        shown.append(text.push(token))
        if text.stopped:
            return shown, True
    shown.append(text.finish())
    return shown, text.stopped


def until(text: str, stop: tuple[str, ...]) -> str:
    positions = [text.find(s) for s in stop if s in text]
    return text[: min(positions)] if positions else text


@given(ids=st.lists(st.integers(0, 259), max_size=24))
@settings(max_examples=300, deadline=None)
def test_any_bytes_stream_as_the_complete_decoding(ids: list[int]) -> None:
    """Valid or not, the streamed text equals the complete decoding, without an unfinished end."""
    shown, _ = stream(BYTES, ids)
    complete = BYTES.decode(ids, skip_special_tokens=True)
    assert "".join(shown).rstrip("\ufffd") == complete.rstrip("\ufffd")


@pytest.mark.parametrize("end", [b"", b"\xe7", b"\xe7\xba"])
@pytest.mark.parametrize("text", ["end \ufffd", "\ufffd", "a\ufffd\ufffd", "a\ufffdb", "b"])
def test_the_replacement_character_that_the_model_wrote_stays(text: str, end: bytes) -> None:
    """Only the bytes of an unfinished character are left out, not a U+FFFD of the text."""
    raw = text.encode() + end
    assert "".join(stream(BYTES, list(raw))[0]) == text
    if not end:  # with byte fallback, all bytes of a broken run decode to U+FFFD
        assert "".join(stream(PIECES, list(raw))[0]) == text


words = st.lists(
    st.sampled_from(["▁", "▁a", "b", "▁cat", "s", ".", "▁▁", "你", "é", "🙂"]), max_size=16
)


@given(words=words)
@settings(max_examples=200, deadline=None)
def test_pieces_and_fallback_bytes_stream_as_the_complete_decoding(words: list[str]) -> None:
    ids = []
    for word in words:
        known = PIECES.get_vocab().get(word)
        ids += [known] if known is not None else list(word.encode())
    shown, _ = stream(PIECES, ids)
    assert "".join(shown) == PIECES.decode(ids)
    assert "\ufffd" not in "".join(shown)


@given(
    text=st.text("abñ你🙂 ", max_size=20),
    stop=st.lists(st.text("abñ你🙂 ", min_size=1, max_size=4), max_size=3).map(tuple),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_across_tokens(text: str, stop: tuple[str, ...]) -> None:
    """One token per byte: the text up to the first stop string, and never a part of one."""
    shown, stopped = stream(BYTES, list(text.encode()), stop)
    assert stopped == any(s in text for s in stop)
    # Of several stop strings, the one that is complete first counts.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    expected = until(text[: min(ends)], stop) if ends else text
    assert "".join(shown) == expected
    for end in range(len(shown)):
        assert expected.startswith("".join(shown[: end + 1]))


def test_an_unfinished_character_is_held_back() -> None:
    text = TextStream(BYTES)
    assert [text.push(b) for b in "a🙂".encode()] == ["a", "", "", "", "🙂"]
    assert [text.push(b) for b in "é".encode()[:1]] == [""] and text.finish() == ""
    text = TextStream(BYTES, ("STOP",))
    assert [text.push(b) for b in b"xSTO"] == ["x", "", "", ""]
    assert text.push(ord("x")) == "STOx" and text.push(259) == ""  # </s> has no text
    assert [text.push(b) for b in b"ST"] == ["", ""] and text.finish() == "ST"


@pytest.mark.parametrize("new", [5, 12])
def test_a_stop_string_ends_an_answer_in_the_engine(new: int) -> None:
    """The stop string is from the middle of the model's own answer."""
    model = model_of("llama", "layers", "probe")
    row = row_for(model, "llama", 9)
    plain = run(Engine(model, BYTES, eos=()), [request_for(model, row, max_new_tokens=new)])
    complete = BYTES.decode(plain.tokens["a"])
    assert plain.text["a"] == complete.rstrip("\ufffd") and plain.last["a"].finished == "length"
    stop = complete[2:4]
    engine = Engine(model, BYTES, eos=())
    transcript = run(engine, [request_for(model, row, max_new_tokens=new, stop=(stop,))])
    assert transcript.text["a"] == complete[: complete.find(stop)]
    assert transcript.last["a"].finished == "stop"
    tokens = transcript.tokens["a"]
    assert tokens == plain.tokens["a"][: len(tokens)] and stop in BYTES.decode(tokens)
    assert engine.stats.kv_bytes == 0


def test_a_failing_tokenizer_ends_its_own_request_only() -> None:
    class Broken:
        def decode(self, ids: list[int], **_: object) -> str:
            if len(ids) > 1:
                raise KeyError("no such token")
            return "a"

    model = model_of("llama", "layers", "probe")
    row = row_for(model, "llama", 9)
    engine = Engine(model, Broken(), eos=())
    transcript = run(engine, [request_for(model, row, max_new_tokens=9)])
    assert transcript.last["a"].finished == "error" and "KeyError" in transcript.last["a"].error
    assert engine.stats.kv_bytes == engine.active == 0
