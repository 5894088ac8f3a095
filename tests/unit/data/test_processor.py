"""The scratch processor: saving and loading, chat template, vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmray.config import ScratchConfig
from fmray.data.processor import fingerprint, load_processor, scratch_processor

TEXTS = ["<image>\nwhat color topleft ?", "red", "how many red ?", "one", "Red"]


def test_reloaded_processor_is_identical(tmp_path: Path) -> None:
    processor = scratch_processor(TEXTS, ScratchConfig())
    processor.save_pretrained(tmp_path / "once")
    loaded = load_processor(tmp_path / "once")
    loaded.save_pretrained(tmp_path / "twice")
    again = load_processor(tmp_path / "twice")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8))
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "how many red ?"}],
        },
        {"role": "assistant", "content": "one"},
    ]
    outputs = []
    for each in (processor, loaded, again):
        text = each.apply_chat_template(messages)
        assert text == "<s><image>\nhow many red ? ASSISTANT: one</s>"
        outputs.append(each(images=[image], text=[text], return_tensors="pt"))
    for output in outputs[1:]:
        assert (output["input_ids"] == outputs[0]["input_ids"]).all()
        assert (output["pixel_values"] == outputs[0]["pixel_values"]).all()
    assert outputs[0]["pixel_values"].shape == (1, 3, 32, 32)
    assert len({fingerprint(each) for each in (processor, loaded, again)}) == 1
    assert fingerprint(scratch_processor(TEXTS[:-1], ScratchConfig())) != fingerprint(processor)
    assert fingerprint(scratch_processor(TEXTS, ScratchConfig(image_size=48))) != fingerprint(
        processor
    )


def test_chat_template_adds_few_tokens() -> None:
    processor = scratch_processor(TEXTS, ScratchConfig())
    messages = [
        {"role": "user", "content": "how many red ?"},
        {"role": "assistant", "content": "one"},
    ]
    text = processor.apply_chat_template(messages)
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert text.startswith(prompt)
    tokens = processor.tokenizer.tokenize(text)
    assert tokens == ["<s>", "how", "many", "red", "?", "ASSISTANT:", "one", "</s>"]
    assert processor.tokenizer.decode(processor.tokenizer("what red ?").input_ids) == "what red ?"


def test_vocabulary_keeps_the_most_frequent_words_and_case() -> None:
    processor = scratch_processor(["a a a b b c", "Dog"] * 2, ScratchConfig(max_vocabulary=16))
    vocabulary = processor.tokenizer.get_vocab()
    assert {"a", "b", "c", "Dog"} <= set(vocabulary) and "dog" not in vocabulary
    many = scratch_processor(
        [" ".join(f"w{i}" for i in range(99)), "w7 w7"], ScratchConfig(max_vocabulary=16)
    )
    assert len(many.tokenizer) == 16 and "w7" in many.tokenizer.get_vocab()
    unknown = many.tokenizer.unk_token_id
    assert many.tokenizer("nowhere", add_special_tokens=False).input_ids == [unknown]


def test_folder_without_processor_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing: contains no processor"):
        load_processor(tmp_path / "nothing")
    scratch_processor(TEXTS, ScratchConfig()).tokenizer.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"text: its processor has no (tokenizer|image_processor)"):
        load_processor(tmp_path / "text")
