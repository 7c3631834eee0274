"""Small things made on the spot that the fuzzers damage: a tokenizer, a model folder, rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # seconds to import, and most targets need none
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

LLAMA = Path(__file__).parents[1] / "golden" / "families" / "llama"
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
# One token a byte, within the 96 tokens of the golden Llama where the text is plain.
PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'-\"{}[]\n"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
NO_SPECIAL_TOKENS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = (CHATML, TOOLS, STRICT, NO_SPECIAL_TOKENS)

U, A = ({"role": role} for role in ("user", "assistant"))
ROWS: list[dict[str, Any]] = [
    {"prompt": "What is two and two?", "chosen": " Four.", "rejected": " Perhaps five, or so."},
    {"prompt": "Name a colour.", "chosen": " Blue.", "rejected": " Seventeen.", "weight": 0.5},
    {
        "prompt": [{**U, "content": "Is tea hot?"}],
        "chosen": [{**A, "content": "Yes, it is."}],
        "rejected": [{**A, "content": "No."}],
    },
]


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens of a chat model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _fast(backend, template)


def _fast(backend: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = template
    return fast


def model_folder(folder: Path) -> Path:
    """A two-layer Llama of 96 tokens in one file, with a tokenizer of characters."""
    from tokenizers import Tokenizer, decoders, models

    shutil.copytree(LLAMA, folder, ignore=shutil.ignore_patterns("*.npz"))
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *PLAIN])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.Fuse()
    _fast(backend, CHATML).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
