"""The processor of a run: tokenizer, image processor and chat template.

`load_processor` loads that of a pretrained model, `scratch_processor` makes one for a model that is
trained from scratch. Both survive `save_pretrained` and `AutoProcessor.from_pretrained` unchanged,
and `fingerprint` identifies them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoProcessor, CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from fmray.config import ScratchConfig
from fmray.runtime.files import digest_of

if TYPE_CHECKING:
    from transformers import ProcessorMixin

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
ANSWER_MARK = "ASSISTANT:"  # one token; the answer follows it

# Renders "<s><image>\nwhat color topleft ? ASSISTANT: red</s>how many red ? ASSISTANT: one</s>".
# The content of a message may also be a plain string.
CHAT_TEMPLATE = (
    "{{ '<s>' }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ ' ASSISTANT: ' }}{%- endif -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>\n' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{ '</s>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"
)


def scratch_processor(texts: Iterable[str], model: ScratchConfig) -> LlavaProcessor:
    """Return a processor for a small LLaVA: one token per word, and CLIP's image preprocessing.

    The vocabulary has at most `model.max_vocabulary` entries: six special ones and the most
    frequent words of `texts` (ties by spelling); other words are `<unk>`. Text is split at spaces
    and around punctuation; case matters.
    """
    splitter = Whitespace()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text.replace("<image>", " ")))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    reserved = [*SPECIAL_TOKENS, ANSWER_MARK]
    free = model.max_vocabulary - len(reserved)
    entries = [*reserved, *[word for word in words if word not in reserved][:free]]
    vocabulary = {word: index for index, word in enumerate(entries)}

    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(ANSWER_MARK, special=False)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="right",
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": model.image_size},
        crop_size={"height": model.image_size, "width": model.image_size},
        # black pixels stay zero
        image_mean=[0.0, 0.0, 0.0],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=model.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" then drops
        chat_template=CHAT_TEMPLATE,
    )


def unknown_token(processor: ProcessorMixin) -> int | None:
    """Return the id of the token that words outside the vocabulary become.

    None if there is none, or if it also ends answers, as GPT-2's does: byte-level tokenizers, which
    know every text, name some token.
    """
    tokenizer = processor.tokenizer
    return None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id


def load_processor(source: str | Path, revision: str | None = None) -> ProcessorMixin:
    """Load the processor of a model from a directory or the hub.

    A tokenizer without padding token, such as Llama 3's, pads with its end-of-sequence token:
    padding is masked and has no loss, so any token will do.

    Raises:
        ValueError: there is none, or it lacks a tokenizer, an image processor, a chat template or
            an end-of-sequence token.
    """
    try:
        processor = AutoProcessor.from_pretrained(str(source), revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: contains no processor that transformers can load ({error})"
        ) from error
    for needed in ("tokenizer", "image_processor", "chat_template"):
        if getattr(processor, needed, None) is None:
            raise ValueError(
                f"{source}: its processor has no {needed}; a vision-language chat model is needed"
            )
    tokenizer = processor.tokenizer
    if tokenizer.eos_token is None:
        raise ValueError(
            f"{source}: its tokenizer has no end-of-sequence token, which ends every answer; set"
            " eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def fingerprint(processor: ProcessorMixin) -> str:
    """Return a hash of everything that decides token ids and pixels; survives saving."""
    tokenizer = processor.tokenizer
    images = {
        key: value
        for key, value in processor.image_processor.to_dict().items()
        if not key.startswith("_")
        and not key.endswith("_type")  # names of classes, which may differ after loading
    }
    parts = {
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "images": images,
        "class": type(processor).__name__,
        "patch_size": getattr(processor, "patch_size", None),
        "chat_template": processor.chat_template,
    }
    return digest_of(parts, default=str)
