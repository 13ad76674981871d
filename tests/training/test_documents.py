import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.training.documents import BadDocuments, Document, find_files, stream_documents

TEXTS = ["first", "zweites: Zürich\nmit Zeile", "third \U0001f642"]
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def write_parquet(path, values, name="text", kind=None):
    pyarrow.parquet.write_table(pyarrow.table({name: pyarrow.array(values, kind)}), path)
    return path


def texts(*inputs, **keywords):
    return [document.text for document in stream_documents([str(item) for item in inputs], **keywords)]


def test_every_format_gives_the_same_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    half = LINES.index(b"\n") + 1  # two frames, as parallel compressors write
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:]))
    write_parquet(tmp_path / "d.parquet", TEXTS)
    for path in sorted(tmp_path.iterdir()):
        expected = [Document(text, path, line) for line, text in enumerate(TEXTS, 1)]
        assert list(stream_documents([str(path)])) == expected
    assert texts(tmp_path / "*") == TEXTS * 4


def test_byte_order_mark_and_blank_lines_are_no_fault(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\n\n')
    assert list(stream_documents([str(path)], bad=BadDocuments(0))) == [Document("a", path, 1), Document("b", path, 3)]


def test_text_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": "y"}\n')
    assert texts(tmp_path / "a.jsonl", text_key="body") == ["x"]
    write_parquet(tmp_path / "a.parquet", ["z"], name="body", kind=pyarrow.large_string())
    assert texts(tmp_path / "a.parquet", text_key="body") == ["z"]


def test_every_kind_of_bad_document_is_counted_and_located(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n'
                     b'{"text": " \\n "}\n'          # 2 empty document
                     b'{"text": "cut\n'              # 3 broken JSON
                     b'{"body": "x"}\n'              # 4 missing text
                     b'["text"]\n'                   # 5 missing text
                     b'{"text": null}\n'             # 6 missing text
                     b'{"text": 5}\n'                # 7 text is not a string
                     b'{"text": "\xff"}\n'           # 8 bad UTF-8
                     b'{"text": "\\ud800"}\n'        # 9 bad UTF-8: half a surrogate pair
                     + b'{"n": ' + b"9" * 5000 + b"}\n"   # 10 broken JSON: no such int
                     + b"[" * 100_000 + b"\n"        # 11 broken JSON: too deep
                     b'{"text": "good too"}')
    bad = BadDocuments(limit=10)
    assert texts(path, bad=bad) == ["good", "good too"]
    assert bad.counts == {"empty document": 1, "broken JSON": 3, "missing text": 3, "text is not a string": 1,
                          "bad UTF-8": 2}
    assert bad.report() == (
        "10 unusable documents (2 bad UTF-8, 3 broken JSON, 1 empty document, 3 missing text, 1 text is not a string), "
        f"first {path}:2 (empty document), {path}:3 (broken JSON), {path}:4 (missing text), {path}:5 (missing text), "
        f"{path}:6 (missing text)")


def test_bad_rows_of_parquet(tmp_path):
    values = pyarrow.array([b"good", b"\xff", None, b" ", b"good too"], pyarrow.binary())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": values.view(pyarrow.string())}), path)
    bad = BadDocuments(limit=3)
    assert texts(path, bad=bad) == ["good", "good too"]
    assert [(item.kind, item.line) for item in bad.first] == [
        ("bad UTF-8", 2), ("missing text", 3), ("empty document", 4)]


def test_too_many_bad_documents_stop_the_run(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{\n{\n')
    assert texts(path, bad=BadDocuments(2)) == ["good"]
    with pytest.raises(FlexOlmoError) as caught:
        texts(path, bad=BadDocuments(1))
    assert str(caught.value) == (f"2 unusable documents (2 broken JSON), first {path}:2 (broken JSON), "
                                 f"{path}:3 (broken JSON): more than the 1 that --max-bad allows")
    with pytest.raises(FlexOlmoError, match=r"^1 unusable document \(1 broken JSON\)"):
        texts(path, bad=BadDocuments(0))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_compression_is_an_error_not_a_shorter_file(tmp_path, suffix, damage):
    lines = b"".join(b'{"text": "%d"}\n' % (number * 2654435761 % 2**32) for number in range(100_000))
    data = bytearray(gzip.compress(lines) if suffix == "gz" else zstandard.compress(lines))
    if damage == "cut":
        del data[-10:]
    else:
        data[len(data) // 2] ^= 0xFF
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(data)
    with pytest.raises(FlexOlmoError, match=rf"^{path} cannot be read after line \d+: .+"):
        texts(path, bad=BadDocuments(10**6))


def test_not_the_format_that_the_name_says(tmp_path):
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(LINES)
        with pytest.raises(FlexOlmoError, match=f"^{tmp_path / name} cannot be read after line 0: "):
            texts(tmp_path / name)
    (tmp_path / "a.parquet").write_bytes(LINES)
    with pytest.raises(FlexOlmoError, match=f"^{tmp_path / 'a.parquet'} cannot be read as Parquet after row 0: "):
        texts(tmp_path / "a.parquet")


def test_wrong_parquet_column(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x"], name="texts")
    with pytest.raises(FlexOlmoError) as caught:
        texts(path)
    assert str(caught.value) == f"{path} has no column 'text' (did you mean 'texts'?); its columns are texts"
    with pytest.raises(FlexOlmoError, match="column 'text' is of type int64; expected string$"):
        texts(write_parquet(tmp_path / "b.parquet", [1]))


def test_find_files_sorts_patterns_and_takes_each_file_once(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        (tmp_path / name).touch()
    found = find_files([str(tmp_path / "b.jsonl"), str(tmp_path / "**" / "*.jsonl")])
    assert found == [tmp_path / "b.jsonl", tmp_path / "a.jsonl", tmp_path / "sub" / "c.jsonl"]


def test_find_files_refuses(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(FlexOlmoError, match=f"^{tmp_path}/no.jsonl does not exist; expected a file or a pattern"):
        find_files([f"{tmp_path}/no.jsonl"])
    with pytest.raises(FlexOlmoError, match=f"^{tmp_path} is a folder; expected files, for example '{tmp_path}/"):
        find_files([str(tmp_path)])
    with pytest.raises(FlexOlmoError, match=r"a.txt: unknown kind of file; expected a name that ends in \.jsonl, "):
        find_files([str(tmp_path / "a.txt")])


def test_missing_pyarrow_names_the_install_command(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FlexOlmoError, match=f"^{path} needs pyarrow; install it with: pip install pyarrow$"):
        texts(path)
