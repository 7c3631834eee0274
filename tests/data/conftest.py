"""Small tokenizers made on the spot, with the special tokens and chat templates of well-known families."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from easydel.data.batching.collate import Collator, RowCollator
from easydel.data.batching.packing import PackingLayout
from easydel.data.preference.template_process import shared_process
from easydel.data.preference.transform import PreferenceTransform

SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "Write a short poem about the sea, the sky and the wind.",
    "The answer is 42. The answer is not 43.\n\nI hope this helps!",
    "user\nassistant\nsystem\ntool\nUser: Hello there.\nAssistant: Hello, how can I help you today?",
    "I am sorry.\n\nBut I do not know.  Thank you very much.\n",
] * 4

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] '"
    " + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_SPECIAL_TOKENS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How a family of models writes a conversation."""

    template: str
    bos: str | None
    eos: str
    stop: str
    other_specials: tuple[str, ...] = ()
    adds_bos: bool = False


FAMILIES = {
    "chatml": Family(CHATML, None, "<|im_end|>", "<|im_end|>", ("<|im_start|>", "<|endoftext|>")),
    "llama3": Family(
        LLAMA3, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), True,
    ),
    "mistral": Family(MISTRAL, "<s>", "</s>", "</s>", (), True),
    "llama2": Family(LLAMA2, "<s>", "</s>", "</s>", (), True),
    "phi3": Family(PHI3, "<s>", "<|endoftext|>", "<|end|>", ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")),
    "no_special_tokens": Family(NO_SPECIAL_TOKENS, "<s>", "</s>", "</s>", (), True),
}  # fmt: skip


@lru_cache
def make_chat_tokenizer(
    name: str, *, trim_offsets: bool = False, merge_across_words: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few hundred tokens; pad is eos, as it is in many a fine-tune."""
    family = FAMILIES[name]
    specials = [token for token in (family.bos, family.eos, *family.other_specials) if token is not None]
    tokenizer = Tokenizer(models.BPE())
    # Without the usual split into words, merges such as ".\n\n" and ": H" form.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merge_across_words)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=6,
            show_progress=False,
        ),
    )
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if family.adds_bos:
        bos_id = tokenizer.token_to_id(family.bos)
        steps.append(processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[(family.bos, bos_id)]))
    tokenizer.post_processor = processors.Sequence(steps)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.eos,
        additional_special_tokens=list(family.other_specials),
    )
    fast.chat_template = family.template
    return fast


@pytest.fixture(scope="session")
def families():
    return FAMILIES


@pytest.fixture(scope="session")
def make_tokenizer():
    """Family name, whether offsets leave out white space, whether tokens span words -> a tokenizer, shared."""
    return make_chat_tokenizer


@pytest.fixture(scope="session")
def chatml():
    return make_chat_tokenizer("chatml")


@pytest.fixture(scope="session")
def llama3():
    return make_chat_tokenizer("llama3")


@pytest.fixture(scope="session")
def mistral():
    return make_chat_tokenizer("mistral")


REAL_DATA = Path(__file__).parents[2] / "../shared/data"


@pytest.fixture(scope="session")
def real_rows():
    """Every row of the real data beside the repository."""
    files = sorted(REAL_DATA.glob("*.jsonl"))
    if not files:
        pytest.skip("no real data in ../shared/data")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def row_collator(chatml) -> RowCollator:
    transform = PreferenceTransform(chatml, max_length=64, max_prompt_length=32)
    return RowCollator(transform, Collator(PackingLayout(padding_value=0), vocab_size=len(chatml)))


def assert_same(batch, other) -> None:
    assert batch.keys() == other.keys()
    for key, value in batch.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key)


@pytest.fixture(scope="module")
def one_renderer():
    """Keep the process that renders chat templates: it would start anew with each transform of a test."""
    return shared_process()
