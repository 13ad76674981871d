"""Each filter on a few documents that it must keep or drop."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datatrove.data import Document

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.mix.filters import FILTERS, parse_filter

PROSE = ("The old mill by the river had been quiet for years, and the people of the town seldom went there. "
         "In spring a young miller came to look at it with his brother. They found that the wheel could be mended. "
         "By the end of the summer it turned again, and farmers brought their grain to be ground. "
         "It is said that the bread of that year was the best that anybody could remember.\n"
         "The miller stayed, and he was happy to have found the place.")
LIST = "\n".join(f"- item {number} of the list and that" for number in range(40))


def result(value, text=PROSE, **metadata):
    found = parse_filter("recipe x", value).build().filter(Document(text, "1", metadata=metadata))
    return found if isinstance(found, tuple) else (found, None)


@pytest.mark.parametrize("value, text, expected", [
    ("gopher_quality", PROSE, True),
    ("gopher_quality", "Too short to be of the use.", "gopher_short_doc"),
    ("gopher_quality", LIST, "gopher_too_many_bullets"),
    ({"gopher_quality": {"min_doc_words": 200}}, PROSE, "gopher_short_doc"),
    ("gopher_repetition", PROSE, True),
    ("gopher_repetition", PROSE.splitlines()[1] + "\n" + "The same line again.\n" * 20, "dup_line_frac"),
    ("c4_quality", PROSE, True),
    ("c4_quality", PROSE + "\nLorem ipsum dolor sit amet.", "lorem_ipsum"),
    ("c4_quality", "One sentence of it. And another one.", "too_few_sentences"),
    ("fineweb_quality", PROSE, True),
    ("fineweb_quality", "no stop here\n" * 9, "line_punct_ratio"),
    ({"regex": {"regex_exp": "(?i)casino"}}, PROSE, True),
    ({"regex": {"regex_exp": "(?i)casino"}}, "The Casino is open.", False),
    ({"length": {"at_least": 10, "at_most": 20}}, "ten to twenty", True),
    ({"length": {"at_least": 10, "at_most": 20}}, "short", "short"),
    ({"length": {"at_least": 10, "at_most": 20}}, "long" * 9, "long"),
    ({"frequent_words": {"top_1": 0.3}}, PROSE, True),
    ({"frequent_words": {"top_1": 0.3}}, "0, 0, 0, 1, 2", "top_1"),
    ({"frequent_words": {"top_1": 0.5, "top_2": 0.6}}, "x = x + y * y / z", "top_2"),
])
def test_text(value, text, expected):
    assert result(value, text) == {True: (True, None), False: (False, None)}.get(expected, (False, expected))


@pytest.mark.parametrize("url, expected", [
    ("https://www.example.org/news/mill", True),
    ("https://blog.bad.co.uk/a", "domain"),
    (None, "no_url"),
])
def test_url(url, expected):
    value = {"url": {"extra_domains": ["bad.co.uk"], "use_integrated_lists": False}}
    assert result(value, url=url) == ((True, None) if expected is True else (False, expected))


@pytest.mark.parametrize("value, given, expected", [
    ({"label": {"key": "k", "keep": ["a", "b"]}}, "b", (True, None)),
    ({"label": {"key": "k", "keep": ["a", "b"]}}, "c", (False, None)),
    ({"label": {"key": "k", "drop": ["a"]}}, "b", (True, None)),
    ({"label": {"key": "k", "drop": ["a"]}}, "a", (False, None)),
    ({"label": {"key": "k", "drop": ["a"]}}, None, (False, "missing")),
    ({"number": {"key": "k", "at_least": 2}}, 2, (True, None)),
    ({"number": {"key": "k", "at_least": 2}}, 1.5, (False, None)),
    ({"number": {"key": "k", "at_most": 2}}, None, (False, "missing")),
])
def test_values(value, given, expected):
    assert result(value, k=given) == expected


@pytest.fixture(scope="module")
def fasttext_model(tmp_path_factory):
    """Tells English from German, as far as its few sentences go."""
    pytest.importorskip("fasttext")
    folder = tmp_path_factory.mktemp("fasttext")
    english = ["the house and the garden of my father", "this is what we have and they know", "where are you going now"]
    german = ["das Haus und der Garten von meinem Vater", "das ist was wir haben und sie wissen", "wohin gehst du"]
    (folder / "train.txt").write_text("".join(
        f"__label__{label} {text}\n" for label, texts in (("en", english), ("de", german)) for text in texts * 20))
    train = ("import sys, fasttext; fasttext.train_supervised(sys.argv[1], epoch=20, dim=8, bucket=1000, thread=1, "
             "verbose=0).save_model(sys.argv[2])")
    # Its training, not its prediction, reads memory that it has not written: 255 is glibc's word for zeros there.
    subprocess.run([sys.executable, "-c", train, folder / "train.txt", folder / "lid.bin"], check=True,
                   env=os.environ | {"MALLOC_PERTURB_": "255"})
    return str(folder / "lid.bin")


def test_language_and_fasttext(fasttext_model):
    language = {"language": {"model": fasttext_model, "languages": ["en"]}}
    assert result(language, "the garden and\nthe house") == (True, "en")
    assert result(language, "der Garten und\ndas Haus") == (False, "de")
    kept = {"fasttext": {"model_url": fasttext_model, "keep_labels": ["de", 0.7]}}
    assert result(kept, "der Garten und das Haus")[0] is True
    assert result(kept, "the garden and the house")[0] is False


def test_the_model_is_the_one_that_the_file_has_now(fasttext_model, tmp_path):
    def tells(value, text="der Garten und das Haus"):
        return result({value: {"fasttext": {"model_url": str(tmp_path / "m.bin"), "keep_labels": ["de", 0.7]},
                               "language": {"model": str(tmp_path / "m.bin"), "languages": ["de"]}}[value]}, text)[0]

    for name in ("fasttext", "language"):
        with pytest.raises(FlexOlmoError, match=f"^the filter {name}: model {tmp_path}/m.bin does not exist; expected"):
            tells(name)
    (tmp_path / "m.bin").write_bytes(b"no model" * 9)
    for name in ("fasttext", "language"):
        with pytest.raises(FlexOlmoError, match=f"^the filter {name}: model {tmp_path}/m.bin cannot be loaded; expect"):
            tells(name)
    shutil.copy(fasttext_model, tmp_path / "m.bin")
    spec = parse_filter("recipe x", {"language": {"model": str(tmp_path / "m.bin"), "languages": ["de"]}})
    assert spec.model == tmp_path / "m.bin" and parse_filter("recipe x", "c4_quality").model is None
    assert tells("fasttext") is tells("language") is True
    swapped = Path(fasttext_model).read_bytes().replace(b"__label__de", b"__label__xx").replace(
        b"__label__en", b"__label__de").replace(b"__label__xx", b"__label__en")
    (tmp_path / "m.bin").write_bytes(swapped)
    assert tells("fasttext") is tells("language") is False


def test_a_label_that_the_model_does_not_have(fasttext_model):
    with pytest.raises(FlexOlmoError, match="^the filter fasttext: model .* has no label 'fr'; its labels are "):
        parse_filter("recipe x", {"fasttext": {"model_url": fasttext_model, "keep_labels": ["fr", 0.7]}}).build()
    with pytest.raises(FlexOlmoError, match="^the filter fasttext: expected labels with their scores"):
        parse_filter("recipe x", {"fasttext": {"model_url": fasttext_model}}).build()


@pytest.mark.parametrize("value, message", [
    ("gopher_qualty", r"^recipe x: unknown filter 'gopher_qualty' \(did you mean 'gopher_quality'\?\); there are "),
    ({"gopher_quality": {"min_doc_word": 3}},
     r"^recipe x: filter gopher_quality: unknown option 'min_doc_word' \(did you mean 'min_doc_words'\?\)$"),
    ({"gopher_quality": {"exclusion_writer": 3}}, "filter gopher_quality: unknown option 'exclusion_writer'$"),
    ({"gopher_quality": {"min_doc_words": "many"}}, "min_doc_words = 'many': expected a number$"),
    ({"gopher_quality": {"language": "klingon"}}, "^the filter gopher_quality: Language 'klingon' doesn't have a tok"),
    ({"c4_quality": {"filter_policy": 1}}, "filter_policy = 1: expected true or false$"),
    ({"regex": {"regex_exp": "(("}}, "^the filter regex: missing \\), unterminated subpattern at position 1$"),
    ({"label": {"key": ["k"], "keep": ["a"]}}, r"^recipe x: filter label: key = \['k'\]: expected text$"),
    ({"language": {"model": "m", "languages": "en"}}, "filter language: languages = 'en': expected a list$"),
    ({"number": {"key": None}}, "^recipe x: filter number: the option 'key' is missing$"),
    ({"number": {}}, "^recipe x: filter number: the option 'key' is missing$"),
    ({"length": {}, "url": {}}, "expected a name, or a mapping of one name to its options$"),
    ({"length": [3]}, r"^recipe x: filter length: expected a mapping of options, got \[3\]$"),
    ({"label": {"key": "k"}}, "^the filter label: expected a list of values, either to keep or to drop$"),
    ({"language": {"model": "nowhere.bin", "languages": ["en"]}}, "^the filter language: model nowhere.bin does not "),
])
def test_refusals(value, message):
    with pytest.raises(FlexOlmoError, match=message):
        parse_filter("recipe x", value).build()


def test_every_filter_is_tested():
    tested = {"gopher_quality", "gopher_repetition", "c4_quality", "fineweb_quality", "regex", "fasttext", "url",
              "language", "label", "number", "length", "frequent_words"}
    assert set(FILTERS) == tested
