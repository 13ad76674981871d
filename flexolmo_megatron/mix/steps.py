"""Filters on what documents carry beside their text, some of datatrove without a network, and the end of a pipeline."""

import json
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import FastTextClassifierFilter, LanguageFilter, URLFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.lid import FT176LID
from datatrove.utils.text import SPLIT_TEXT_DOCUMENTS

from flexolmo_megatron.errors import first_line
from flexolmo_megatron.files import atomic_file

_WORD = re.compile(r"\w+")


class Url(URLFilter):
    """datatrove's, with the list of public suffixes that comes with tldextract; a document without a URL is dropped."""

    def __init__(self, soft_word_threshold: int = 2, extra_domains: Any = None, extra_urls: Any = None,
                 banned_words: Any = None, banned_subwords: Any = None, soft_banned_words: Any = None,
                 use_integrated_lists: bool = True) -> None:
        from tldextract import TLDExtract

        super().__init__(soft_word_threshold, extra_domains, extra_urls, banned_words, banned_subwords,
                         soft_banned_words, use_integrated_lists)
        self.tldextractor = TLDExtract(suffix_list_urls=())

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """Look at the URL."""
        if not isinstance(document.metadata["url"], str) or not document.metadata["url"]:
            return False, "no_url"
        return super().filter(document)


def load_fasttext(file: str) -> Any:
    """Return the fastText model of a local file: datatrove makes a copy once, and would use it for ever after.

    Raises:
        ValueError: there is no such file, or it is no fastText model.
    """
    from fasttext.FastText import _FastText

    if not Path(file).is_file():
        raise ValueError(f"model {file} does not exist; expected the file of a fastText model")
    try:
        return _FastText(file)
    except Exception as error:  # a damaged file shows in many ways
        raise ValueError(f"model {file} cannot be loaded; expected a fastText model ({first_line(error)})") from error


class _LocalLid(FT176LID):
    def __init__(self, file: str, languages: list[str]) -> None:
        super().__init__(languages)
        self.file = file

    @cached_property
    def model(self) -> Any:
        """The fastText model."""
        return load_fasttext(self.file)


class Language(LanguageFilter):
    """datatrove's, with the fastText model of a local file, such as lid.176.bin."""

    def __init__(self, model: str, languages: list[str], language_threshold: float = 0.65) -> None:
        super().__init__(languages, language_threshold)
        load_fasttext(model)  # to refuse it now; each process loads its own, as a model cannot be passed on
        self.model = _LocalLid(model, self.languages)

    def filter(self, doc: Document) -> tuple[bool, str]:
        """Keep documents that are likely to be in one of the languages."""
        return bool(super().filter(doc)), str(doc.metadata["language"])


class FastText(FastTextClassifierFilter):
    """datatrove's, with the model of a local file."""

    def __init__(self, model_url: str, keep_labels: list | None = None, remove_labels: list | None = None,
                 save_labels_in_metadata: bool = True, newline_replacement: str = "",
                 filter_mode: str = SPLIT_TEXT_DOCUMENTS) -> None:
        super().__init__(model_url, keep_labels, remove_labels, save_labels_in_metadata,
                         newline_replacement=newline_replacement, filter_mode=filter_mode)
        chosen = self.keep_labels or self.remove_labels
        if not chosen:
            raise ValueError("expected labels with their scores, either to keep or to remove")
        known = [label.removeprefix("__label__") for label in load_fasttext(model_url).labels]
        for label, _ in chosen:
            if label not in known:
                raise ValueError(f"model {model_url} has no label {label!r}; its labels are {', '.join(known)}")

    @cached_property
    def model(self) -> Any:
        """The fastText model."""
        return load_fasttext(self.model_url)


class Label(BaseFilter):
    """Keeps documents by the value of a key: what a classifier, say, has found out about them before."""

    def __init__(self, key: str, keep: list[str] | None = None, drop: list[str] | None = None) -> None:
        super().__init__()
        if (keep is None) == (drop is None) or not isinstance(keep or drop, list):
            raise ValueError("expected a list of values, either to keep or to drop")
        self.key, self.keep, self.drop = key, keep, drop

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """A document without a value is dropped in both cases: nobody knows what it is."""
        value = doc.metadata[self.key]
        if value is None:
            return False, "missing"
        return value in self.keep if self.keep is not None else value not in self.drop


class Number(BaseFilter):
    """Keeps documents whose value of a key is a number within limits."""

    def __init__(self, key: str, at_least: float = float("-inf"), at_most: float = float("inf")) -> None:
        super().__init__()
        self.key, self.at_least, self.at_most = key, at_least, at_most

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Compare."""
        value = doc.metadata[self.key]
        if not isinstance(value, int | float):
            return False, "missing"
        return self.at_least <= value <= self.at_most


class Length(BaseFilter):
    """Keeps documents of a number of characters within limits."""

    def __init__(self, at_least: int = 0, at_most: float = float("inf")) -> None:
        super().__init__()
        self.at_least, self.at_most = at_least, at_most

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Compare."""
        if len(doc.text) < self.at_least:
            return False, "short"
        return (False, "long") if len(doc.text) > self.at_most else True


class FrequentWords(BaseFilter):
    """Drops documents of which the most frequent word, or the two most frequent, make up more than a share."""

    def __init__(self, top_1: float = 1.0, top_2: float = 1.0) -> None:
        super().__init__()
        self.top_1, self.top_2 = top_1, top_2

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Count. Words are runs of letters, digits and underscores."""
        found = _WORD.findall(doc.text)
        counts = [count for _, count in Counter(found).most_common(2)]
        if sum(counts[:1]) > self.top_1 * len(found):
            return False, "top_1"
        return (False, "top_2") if sum(counts) > self.top_2 * len(found) else True


class WriteDocuments(PipelineStep):
    """Writes a shard's documents as JSON lines with text and source."""

    type = "WRITER"
    name = "write"

    def __init__(self, folder: Path, source: str) -> None:
        super().__init__()
        self.folder, self.source = folder, source

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Write; passes nothing on."""
        documents = text_bytes = 0
        with atomic_file(self.folder / f"{rank:06d}.jsonl") as file:
            for document in data:
                record = {"text": document.text, "source": f"{self.source}/{document.id}"}
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                documents += 1
                text_bytes += len(document.text.encode())
        self.stat_update("written", value=documents)
        self.stat_update("text_bytes", value=text_bytes)
        yield from ()
