"""Words of a text in any script: what the linear proxy classifier counts and what near-duplicates are compared by."""

import re
import unicodedata

# Scripts that are written without spaces between words: each of their letters stands for itself.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"

_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")

TOKEN_PATTERN = rf"{_WORD.pattern}|[^\w\s]"
"""Regular expression of a word or of one other visible character, which tells code and formulae from prose."""


def words(text: str) -> list[str]:
    """Words of ``text``, without case, punctuation, layout and differences of Unicode that readers do not see."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
