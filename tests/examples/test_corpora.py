import ast
import json
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from flexolmo_megatron.errors import FlexOlmoError

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"
NAMES = ("public", "code", "arithmetic", "clinic")


@pytest.fixture(scope="module")
def corpora():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import corpora
        patch.setattr(corpora, "TRAIN_BYTES", dict.fromkeys(NAMES, 100_000))
        patch.setattr(corpora, "VALID_BYTES", 10_000)
        yield corpora


@pytest.fixture(scope="module")
def built(corpora, tmp_path_factory):
    files = corpora.build_corpora(tmp_path_factory.mktemp("corpora"))
    return {name: {split: [json.loads(line)["text"] for line in path.read_text().splitlines()]
                   for split, path in splits.items()} for name, splits in files.items()}


def test_sizes_and_document_lengths(built):
    assert tuple(built) == NAMES
    for splits in built.values():
        for split, expected in (("train", 100_000), ("valid", 10_000)):
            lengths = [len(text.encode()) for text in splits[split]]
            assert min(lengths) >= 300 and max(lengths) <= 4000
            assert expected <= sum(lengths) < expected + 4000


def test_no_document_is_in_two_places(built):
    every = [text for splits in built.values() for split in splits.values() for text in split]
    assert len(set(every)) == len(every)
    public = [text for split in built["public"].values() for text in split]
    paragraphs = [paragraph for text in public if is_prose(text) for paragraph in text.split("\n\n")]
    assert len(paragraphs) > 100
    assert len(set(paragraphs)) == len(paragraphs)


def is_prose(text):
    """Whether a public document is prose, rather than one of the settings, tables, pages, sums and work orders."""
    return sum(char.isalpha() or char == " " for char in text) > 0.9 * len(text)


def test_the_seed_decides(corpora, built, tmp_path):
    read = {seed: {name: path["valid"].read_bytes() for name, path in corpora.build_corpora(tmp_path, seed).items()}
            for seed in (0, 1)}
    for name in NAMES:
        assert [json.loads(line)["text"] for line in read[0][name].splitlines()] == built[name]["valid"]
        assert read[0][name] != read[1][name]


def test_public_is_prose_without_source_code(built):
    documents = [text for split in built["public"].values() for text in split]
    prose = [text for text in documents if is_prose(text)]
    assert 0.5 < len("".join(prose)) / len("".join(documents)) < 0.8
    text = "\n".join(prose)
    assert ">>>" not in text and not re.search(r"^\s*(def|class|import|from|return|#) ?\w+.*[:(]?$", text, re.MULTILINE)
    assert sum(char.isalpha() or char == " " for char in text) > 0.93 * len(text)


def test_paragraphs_keep_prose_alone(corpora):
    prose = ("This function returns the first of the two arguments that is given to it, and raises an error where "
             "there is none.")
    text = f"""
Heading of the text
-------------------
{prose}

    value = {{'the': [1, 2]}}  # is this the code of the first function or is it that of the second, which is it?

>>> print('this is the example and it is of the code')
this is the example and it is of the code, and so it is to be left out of the prose.

```
The code that is in the fence of the text and that is to be left out of the prose.
```

x : int
    The first of the arguments that is given to the function in this example of the text.
"""
    assert list(corpora.paragraphs(text)) == [prose]


def test_code_has_no_documentation_strings(corpora, tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""Module."""\n\nimport os\n\n\n'
                    'class A:\n    """Class.\n\n    More.\n    """\n\n    def f(self):\n'
                    '        """Function."""\n        return """kept"""\n\n    async def g(self):\n'
                    "        '''Other.'''\n        # comment\n        return os\n")
    (piece,) = corpora.code_documents(path)
    assert "kept" in piece and "# comment" in piece
    assert not any(word in piece for word in ("Module", "Class.", "More", "Function", "Other"))
    assert ast.parse(piece)


def test_code_is_cut_at_empty_lines(corpora, tmp_path):
    path = tmp_path / "module.py"
    source = "\n\n".join(f"def f{number}(a):\n    return a + {number}" for number in range(500))
    path.write_text(source)
    pieces = list(corpora.code_documents(path))
    assert len(pieces) > 3 and "\n\n".join(pieces) == source
    assert all(len(piece) <= 4000 and ast.parse(piece) for piece in pieces)


def test_every_worked_answer_is_right(built):
    """Each step is an equation of numbers; the answer follows from the last one."""
    texts = [text for split in built["arithmetic"].values() for text in split]
    checked = 0
    for problem in "\n".join(texts).split("Problem ")[1:]:
        steps = re.findall(r"Step \d+: (.*)", problem)
        answer = re.search(r"Answer: (.*)", problem)[1]
        solution = re.search(r"^x = (\d+)$", answer)
        for step in steps:
            sides = [re.sub(r"\d+", r"Fraction(\g<0>)", side) for side in step.split(" = ")]
            values = {eval(side, {"Fraction": Fraction, "x": Fraction(solution[1]) if solution else None})
                      for side in sides}
            assert len(values) == 1, step
            checked += 1
        assert Fraction(re.search(r"[\d/]+", answer)[0].rstrip("/")) in {
            Fraction(number) for step in steps for number in re.findall(r"\d+(?:/\d+)?", step)}, problem
    assert checked > 1000


def test_notes_are_consistent(corpora):
    from generated import clinic_document
    for seed in range(200):
        note = clinic_document(random.Random(seed))
        dates = re.search(r"ADM: (\d+)/\d+  DISCH: (\d+)/\d+  LOS: (\d+)/7", note)
        admitted, discharged, stay = map(int, dates.groups())
        assert discharged - admitted == stay and discharged <= 29
        age, sex = re.search(r"AGE/SEX: (\d+)([MF])", note).groups()
        assert f"PC: {age}YO {sex} WITH " in note


def test_missing_standard_library(corpora, monkeypatch, tmp_path):
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FlexOlmoError, match=f"^{tmp_path} holds no source files; expected those of a full Python"):
        corpora.build_corpora(tmp_path)


def test_command_line_says_what_is_wrong_in_one_sentence():
    result = subprocess.run([sys.executable, FOLDER / "corpora.py", "/proc/nowhere"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("corpora.py: error: cannot write /proc/nowhere/public: ")
