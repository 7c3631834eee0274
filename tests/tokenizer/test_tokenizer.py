"""Tokenizer folders: read or refused in a few words, and written as they came in."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from easydel.tokenizer.tokenizer import load_tokenizer, save_tokenizer
from tests.tiny import CHATML, make_tokenizer

TEXT = "<|im_start|>please, tell me.<|im_end|>"
MESSAGES = [{"role": "user", "content": "tell me"}]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tokenizer as transformers 4 wrote them: template and special tokens in tokenizer_config.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    settings = names | {"chat_template": CHATML, "model_max_length": 512, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def change(folder: Path, file: str = "tokenizer_config.json", **settings) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}


# Reading


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"eos_token": 3}, "eos_token is 3, expected a token"),
        ({"eos_token": {"text": "x"}}, 'eos_token is {"text": "x"}, expected a token'),
        ({"image_token": [1]}, "image_token is [1], expected a token"),
        ({"model_max_length": float("nan")}, "NaN is no number of JSON"),
        ({"pad_token": {"content": "<pad>", "lstrit": True}}, "pad_token is"),
        ({"model_max_length": "many"}, 'model_max_length is "many"'),
        ({"model_max_length": -1}, "model_max_length is -1"),
        ({"extra_special_tokens": ["<|im_start|>", ""]}, "extra_special_tokens is"),
        ({"additional_special_tokens": 7}, "additional_special_tokens is 7, expected a list of tokens"),
        ({"added_tokens_decoder": {"-1": {"content": "x"}}}, "added_tokens_decoder is"),
        ({"added_tokens_decoder": {"9" * 400: {"content": "x"}}}, "added_tokens_decoder is"),
        ({"added_tokens_decoder": {"1": "x"}}, "added_tokens_decoder is"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder is []"),
        ({"chat_template": 5}, "chat_template is 5, expected a template"),
        ({"chat_template": [{"name": "default"}]}, "chat_template is"),
        ({"tokenizer_class": ["a"]}, 'tokenizer_class is ["a"], expected text'),
        ({"padding_side": "up"}, 'padding_side is "up", expected left or right'),
        ({"clean_up_tokenization_spaces": "no"}, "clean_up_tokenization_spaces is"),
        ({"fast_tokenizer_files": ["../../tokenizer.4.0.json"]}, "fast_tokenizer_files is"),
        ({"init_inputs": ["/etc/passwd"]}, "init_inputs is"),
        ({"gguf_file": "/etc/passwd"}, "gguf_file is"),
        ({"auto_map": 3}, "auto_map is 3"),
    ],
)
def test_a_setting_of_another_kind_is_refused_by_name(folder, settings, words):
    change(folder, **settings)
    with pytest.raises(ValueError) as error:
        load_tokenizer(folder)
    assert words in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "config.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"3",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"vocab": 1}',
    ],
    ids=["empty", "list", "number", "utf16", "nested", "nested objects", "digits", "other"],
)
def test_a_damaged_file_is_refused_in_one_line(folder, file, content, capfd):
    (folder / file).write_bytes(content)
    try:
        load_tokenizer(folder)
        assert content == b'{"vocab": 1}' and file != "tokenizer.json"  # a setting that nobody reads
    except ValueError as error:
        assert str(folder) in str(error) and len(str(error).splitlines()) == 1 and len(str(error)) < 500
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("tokens", [{"<x>": "3"}, {"<x>": -1}, {"<x>": 2**70}, {"<x>": True}, {"<x>": None}])
def test_added_tokens_have_ids(folder, tokens):
    (folder / "added_tokens.json").write_text(json.dumps(tokens))
    with pytest.raises(ValueError, match="added_tokens.json cannot be used:\n  <x> is .*, expected a token id"):
        load_tokenizer(folder)


def test_what_is_no_plain_file_is_refused(folder):
    (folder / "added_tokens.json").mkdir()
    with pytest.raises(ValueError, match="expected a plain file"):
        load_tokenizer(folder)
    (folder / "added_tokens.json").rmdir()
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ValueError, match="expected a plain file"):
        load_tokenizer(folder)


def test_the_numbers_of_the_model_size_nothing_here(folder):
    change(folder, "config.json", num_hidden_layers=2**64, vocab_size=[], rope_scaling=3)
    assert load_tokenizer(folder).encode("tell")


def test_other_files_and_code_are_never_read(folder, tmp_path, capfd):
    other = tmp_path / "other.json"
    other.write_text("{}")
    change(folder, tokenizer_file=str(other), vocab_file=str(other), tokenizer_class="NobodysTokenizer")
    assert load_tokenizer(folder).encode(TEXT) == make_tokenizer().encode(TEXT)
    (folder / "evil.py").write_text("raise SystemExit('run')\nclass Evil: pass\n")
    change(folder, auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    try:
        load_tokenizer(folder)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    assert capfd.readouterr().err == ""


def test_a_name_that_is_no_model_is_shown_without_control_characters():
    with pytest.raises(FileNotFoundError) as error:
        load_tokenizer("no\x1b[2Jwhere")
    assert "\x1b" not in str(error.value)


# Writing


def test_an_unchanged_tokenizer_goes_out_byte_for_byte(folder, tmp_path):
    (folder / "tokenization_own.py").write_text("raise SystemExit")
    for load in (load_tokenizer, AutoTokenizer.from_pretrained):
        tokenizer = load(folder)
        tokenizer([TEXT, "tell"], padding="max_length", truncation=True, max_length=9)  # keeps both as its state
        out = tmp_path / load.__name__
        save_tokenizer(tokenizer, out)
        expected = files(folder)
        del expected["tokenization_own.py"]
        assert files(out) == expected
    save_tokenizer(load_tokenizer(folder), folder)
    assert files(folder).keys() == expected.keys() | {"tokenization_own.py"}


def test_the_files_of_a_hub_snapshot_are_copied_through_its_links(folder, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--some--model"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    for place in (snapshot, blobs, repository / "refs"):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for index, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(index))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(index)))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    save_tokenizer(load_tokenizer(snapshot), tmp_path / "out")
    assert files(tmp_path / "out") == files(folder)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_link_out_of_the_folder_is_not_copied(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    (folder / "merges.txt").symlink_to(secret)
    save_tokenizer(load_tokenizer(folder), tmp_path / "out")
    assert b"key" not in files(tmp_path / "out").values()
    assert load_tokenizer(tmp_path / "out").encode(TEXT) == load_tokenizer(folder).encode(TEXT)


def test_a_new_chat_template_changes_the_template_alone(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
    save_tokenizer(tokenizer, tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == tokenizer.chat_template
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    before, after = (json.loads((place / "tokenizer_config.json").read_text()) for place in (folder, tmp_path))
    assert before.pop("chat_template") == CHATML and after == before
    # The template of an earlier save does not outlive it.
    save_tokenizer(load_tokenizer(folder), tmp_path)
    assert load_tokenizer(tmp_path).chat_template == CHATML
    tokenizer.chat_template = None
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None


def changed(folder: Path, how: str) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(folder)
    if how == "pad token":
        tokenizer.pad_token = tokenizer.eos_token
    if how == "added token":
        tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    if how == "side":
        tokenizer.padding_side = "left"
    if how == "length":
        tokenizer.model_max_length = 99
    if how == "made":
        tokenizer = make_tokenizer()
    if how == "templates":
        tokenizer.chat_template = {"default": CHATML, "rag": "{{ messages }}"}
    return tokenizer


@pytest.mark.parametrize("how", ["pad token", "added token", "side", "length", "made", "templates"])
def test_a_changed_tokenizer_is_written_for_older_readers_too(folder, tmp_path, how):
    tokenizer, out = changed(folder, how), tmp_path / "out"
    for _ in range(2):  # the second time over the first
        save_tokenizer(tokenizer, out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    # transformers 4 knows no TokenizersBackend and takes extra_special_tokens for an object.
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_start|>"]
    assert not settings.keys() & {"local_files_only", "is_local", "backend", "extra_special_tokens", "name_or_path"}
    again = load_tokenizer(out)
    assert again.get_vocab() == tokenizer.get_vocab() and again.encode(TEXT) == tokenizer.encode(TEXT)
    for name in ("pad_token", "eos_token", "all_special_ids", "chat_template", "padding_side", "model_max_length"):
        assert getattr(again, name) == getattr(tokenizer, name)
    if how != "templates":
        assert again.apply_chat_template(MESSAGES, tokenize=False) == tokenizer.apply_chat_template(
            MESSAGES, tokenize=False
        )


def test_a_source_that_was_changed_or_lost_since_is_not_copied(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    change(folder, eos_token="<pad>")
    save_tokenizer(tokenizer, tmp_path / "changed")
    shutil.rmtree(folder)
    save_tokenizer(tokenizer, tmp_path / "lost")
    for name in ("changed", "lost"):
        assert load_tokenizer(tmp_path / name).eos_token == "<|im_end|>"


def test_anything_with_save_pretrained_is_saved_by_it(tmp_path, caplog):
    class Processor:
        tokenizer = make_tokenizer()

        def save_pretrained(self, folder):
            self.tokenizer.save_pretrained(folder)
            Path(folder, "processor_config.json").write_text("{}")

    save_tokenizer(Processor(), tmp_path / "processor")
    assert (tmp_path / "processor" / "processor_config.json").exists()
    assert load_tokenizer(tmp_path / "processor").encode(TEXT) == make_tokenizer().encode(TEXT)
    assert "TokenizersBackend" not in (tmp_path / "processor" / "tokenizer_config.json").read_text()
    save_tokenizer(object(), tmp_path / "none")
    assert "the object has no save_pretrained" in caplog.text


def test_words_and_spaces_survive(tmp_path):
    vocabulary = {token: index for index, token in enumerate(["<unk>", "▁", "▁a", "b", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
