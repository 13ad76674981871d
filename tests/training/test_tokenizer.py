import io
import json
import shutil
import sys

import pytest

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.training.tokenizer import load_tokenizer, tokenizer_spec

TEXT = "Zürich, 東京 🙂\n\ttab and 'quotes' <|endoftext|> end"


def test_bytes_round_trip():
    tokenizer = load_tokenizer({"type": "byte"})
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.spec) == (257, 256, {"type": "byte"})
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.decode([*tokenizer.encode(TEXT), tokenizer.eod]) == TEXT
    assert tokenizer.decode([97, 0xC3]) == "a\ufffd"


def test_hugging_face_round_trip_takes_special_tokens_for_text(word_tokenizer):
    tokenizer = load_tokenizer({"type": "huggingface", "path": str(word_tokenizer)})
    ids = tokenizer.encode(TEXT)
    assert tokenizer.eod not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode([*ids, tokenizer.eod]) == TEXT
    assert len(tokenizer.encode("the owner trains the expert")) < len("the owner trains the expert")


def test_spec_of_a_user_names_a_folder_absolutely(word_tokenizer, monkeypatch):
    monkeypatch.chdir(word_tokenizer.parent)
    assert tokenizer_spec("byte") == {"type": "byte"}
    assert tokenizer_spec(word_tokenizer.name) == {"type": "huggingface", "path": str(word_tokenizer)}
    assert tokenizer_spec("owner/name") == {"type": "huggingface", "path": "owner/name"}


@pytest.mark.parametrize(("spec", "message"), [
    ({"type": "bite"}, r"^tokenizer type 'bite': expected 'byte' or 'huggingface' \(did you mean 'byte'\?\)$"),
    ({}, r"^tokenizer type None: expected 'byte' or 'huggingface'$"),
    ({"type": "huggingface"}, r"expected a 'path', the name or folder of a Hugging Face tokenizer$"),
])
def test_wrong_spec(spec, message):
    with pytest.raises(FlexOlmoError, match=message):
        load_tokenizer(spec)


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FlexOlmoError) as caught:
        load_tokenizer({"type": "huggingface", "path": str(tmp_path)})
    assert str(caught.value).startswith(f"cannot load the tokenizer '{tmp_path}': expected 'byte', a folder")
    assert "\n" not in str(caught.value)


def test_code_beside_a_tokenizer_is_not_run(word_tokenizer, tmp_path, monkeypatch):
    folder = shutil.copytree(word_tokenizer, tmp_path / "folder")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\nclass Evil: pass\n")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps(settings | {"tokenizer_class": "Evil"}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # transformers asks unless it is told
    with pytest.raises(FlexOlmoError, match="cannot load the tokenizer"):
        load_tokenizer({"type": "huggingface", "path": str(folder)})
    assert not (tmp_path / "was run").exists()


def test_tokenizer_without_an_end_of_sequence_token(word_tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast
    PreTrainedTokenizerFast(tokenizer_file=str(word_tokenizer / "tokenizer.json")).save_pretrained(tmp_path)
    with pytest.raises(FlexOlmoError, match="has no end-of-sequence token"):
        load_tokenizer({"type": "huggingface", "path": str(tmp_path)})


def test_missing_transformers_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FlexOlmoError, match="^the tokenizer 'x/y' needs transformers; .*: pip install transformers$"):
        load_tokenizer({"type": "huggingface", "path": "x/y"})
