"""Tokens and answer spans against the processors of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from fmray.config import ScratchConfig
from fmray.data.processor import scratch_processor
from fmray.data.records import chat_messages, encode, image_tokens

CONVERSATION = [
    {"from": "human", "value": "<image>\nwhat color topleft ?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "how many red shapes are there ?"},
    {"from": "gpt", "value": "two of them"},
    {"from": "human", "value": "more ?"},
    {"from": "gpt", "value": "no"},
]
ANSWERS = ["red", "two of them", "no"]
TEXT_ONLY = [
    {"from": turn["from"], "value": turn["value"].removeprefix("<image>\n")}
    for turn in CONVERSATION
]

# Like LLaVA 1.5's template: roles in words, a space after each turn, no token ends an answer.
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Like Qwen2-VL's template: a system turn, an end token, a line break after it.
QWEN_TEMPLATE = (
    "<|im_start|>system\nyou help<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(*special: str, **named: Any) -> PreTrainedTokenizerFast:
    words = "what color topleft ? red how many shapes are there two of them more no you help"
    words = [*special, *words.split(" "), "system", "user", "assistant", "USER", "ASSISTANT", ":"]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=special[0]))
    raw.pre_tokenizer = Whitespace()
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=special[0], **named)


def scratch() -> Any:
    return scratch_processor([turn["value"] for turn in CONVERSATION], ScratchConfig())


def llava() -> Any:
    processor = scratch()
    processor.chat_template = LLAVA_TEMPLATE
    return processor


def llava_next() -> Any:
    special = ["<unk>", "<s>", "</s>", "<image>"]
    named = {
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "extra_special_tokens": {"image_token": "<image>"},
    }
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )
    return LlavaNextProcessor(
        images,
        tokenizer(*special, **named),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def qwen2_vl() -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    named["extra_special_tokens"] = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 9}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=pixels),
        tokenizer(*special, **named),
        Qwen2VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    )


@pytest.fixture(params=[scratch, llava, llava_next, qwen2_vl], ids=lambda make: make.__name__)
def processor(request: pytest.FixtureRequest) -> Any:
    """A small processor of each family."""
    return request.param()


def test_spans_are_the_answers_with_their_end_tokens(processor: Any) -> None:
    for conversation in (CONVERSATION, TEXT_ONLY):
        encoded = encode(processor, conversation)
        end = processor.tokenizer.eos_token_id
        for start, stop, answer in zip(encoded.starts, encoded.ends, ANSWERS, strict=True):
            assert encoded.ids[stop - 1] == end
            assert processor.tokenizer.decode(encoded.ids[start : stop - 1]) == answer
        assert (encoded.image_at is not None) == (conversation is CONVERSATION)


def test_every_turn_is_a_prefix_of_the_conversation(processor: Any) -> None:
    """So one tokenization serves all turns."""
    full = encode(processor, CONVERSATION)
    for turns in (1, 2):
        part = encode(processor, CONVERSATION[: 2 * turns])
        end = part.ends[-1]
        assert part.starts == full.starts[:turns] and part.ends == full.ends[:turns]
        assert (part.ids[:end] == full.ids[:end]).all()


@pytest.mark.parametrize("size", [(32, 32), (100, 40), (33, 91), (640, 480)])
def test_length_equals_that_of_the_processor(processor: Any, size: tuple[int, int]) -> None:
    image = Image.fromarray(np.zeros((size[1], size[0], 3), dtype=np.uint8))
    text = processor.apply_chat_template(chat_messages(CONVERSATION))
    real = processor(images=[image], text=[text])["input_ids"][0]
    encoded = encode(processor, CONVERSATION)
    count = image_tokens(processor, size)
    assert count == list(real).count(processor.image_token_id)
    ended_by_template = text.rstrip().endswith(processor.tokenizer.eos_token)
    added = 0 if ended_by_template else len(ANSWERS)  # end tokens that LLaVA's template lacks
    assert len(encoded.ids) - 1 + count == len(real) + added
    assert encoded.turn_tokens(count) == [end - 1 + count for end in encoded.ends]
    expected = [token for token in real if token != processor.image_token_id]
    if ended_by_template:
        assert expected == [token for token in encoded.ids if token != processor.image_token_id]


def test_template_that_rewrites_earlier_turns_is_an_error() -> None:
    processor = scratch()
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ loop.revindex }} "
        "{{ m['content'][-1]['text'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="text of earlier turns changes as the conversation grows"):
        encode(processor, CONVERSATION)


def test_template_whose_output_depends_on_the_texts() -> None:
    """Pieces rendered with marks in place of texts would be wrong here."""
    processor = scratch()
    processor.chat_template = processor.chat_template.replace(
        "{{ part['text'] }}", "{{ part['text'].split('more')[-1] }}"
    )
    changed = [dict(turn) for turn in CONVERSATION]
    changed[1]["value"] = "no more red"
    encoded = encode(processor, changed)
    decoded = [
        processor.tokenizer.decode(encoded.ids[start:end])
        for start, end in zip(encoded.starts, encoded.ends, strict=True)
    ]
    assert decoded == ["red </s>", "two of them </s>", "no </s>"]


def test_template_without_image_token_is_an_error() -> None:
    processor = scratch()
    processor.chat_template = processor.chat_template.replace("<image>", "picture")
    with pytest.raises(ValueError, match=r"0 image tokens \('<image>'\) for one image"):
        encode(processor, CONVERSATION)


def test_image_goes_before_the_text_wherever_the_mark_was() -> None:
    messages = chat_messages([{"from": "human", "value": "what is it?\n<image>"}])
    assert messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    ]


@pytest.mark.parametrize("answer", ["red", "it is <unk>", "write <s>x</s>", "</s>"])
@pytest.mark.parametrize("make", [scratch, llava])
def test_every_answer_has_its_end_token(make: Any, answer: str) -> None:
    """Also one whose text ends in a special token; ingest refuses those."""
    processor = make()
    ask = {"from": "human", "value": "<image>\nwhat color ?"}
    encoded = encode(processor, [ask, {"from": "gpt", "value": answer}])
    tokens = processor.tokenizer
    learned = encoded.ids[encoded.starts[0] : encoded.ends[0]].tolist()
    said = tokens(answer, add_special_tokens=False)["input_ids"]
    assert learned == [*said, tokens.eos_token_id]
