"""A language model as judge, behind any OpenAI-compatible endpoint: points for a generated text beside a reference.

Criteria and scale are those of allenai/FlexOlmo (src/offline_evals/metrics): well written 2 points, coherent and
relevant 2, clear and fluent 1; an answer without a total counts as 3 of 5. The wording is ours, and gives no worked
examples.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from flexolmo_megatron.errors import FlexOlmoError

_PROMPT = """\
Compare a generated {kind} with a reference {kind} and give it points.

- Well written, 2 points or none: {form}
- Coherent and relevant, 2 points or none: it stays with the subject of the reference, without contradiction.
- Clear and fluent, 1 point or none: it reads easily and has no mistakes of grammar.

Give one short reason for each, then end with a line of the form "Total score: N", where N is the sum, from 0 to 5.
{about}
Reference {kind}:
{reference}

Generated {kind}:
{generated}
"""
_FORMS = {"news article": "it is built as a news article is, and suits readers of news.",
          "poem": "it has the form and the artistry of a poem."}
_NO_SCORE = 3.0
"""Points of a text for which the judge named no total."""


@dataclass
class Judge:
    """Asks an endpoint."""

    url: str
    """Base URL, to which /chat/completions is added, such as https://api.openai.com/v1."""
    model: str
    """Name of the model there."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; without it, none is sent."""
    workers: int = 8
    """Requests that are under way at once."""
    attempts: int = 5
    """Of each request, with pauses of 1, 2, 4 ... seconds."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""

    def score(self, kind: str, reference: str, generated: Sequence[str], about: str = "") -> list[float]:
        """Return the points of each generated text, from 0 to 1.

        Args:
            kind: "news article" or "poem".
            reference: the real text.
            generated: with the beginning that the model was given.
            about: what else to know, such as the title.

        Raises:
            FlexOlmoError: the endpoint refuses, or cannot be reached.
        """
        prompts = [_PROMPT.format(kind=kind, form=_FORMS[kind], about=f"\n{about}\n" if about else "",
                                  reference=reference, generated=text) for text in generated]
        with ThreadPoolExecutor(self.workers) as pool:
            return [points(answer) for answer in pool.map(self.ask, prompts)]

    def ask(self, prompt: str) -> str:
        """Return the model's answer to one message.

        Raises:
            FlexOlmoError: see ``score``.
        """
        body = json.dumps({"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0.0,
                           "max_tokens": 512}).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.url.rstrip('/')}/chat/completions"
        for attempt in range(self.attempts):
            try:
                request = urllib.request.Request(url, body, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    content = json.load(response)["choices"][0]["message"]["content"]
                    return content if isinstance(content, str) else ""
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                if error.code not in (408, 429) and error.code < 500:
                    break
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                reason = str(error) or type(error).__name__
            if attempt + 1 < self.attempts:
                time.sleep(2**attempt)
        raise FlexOlmoError(f"the judge at {url} gave no answer for model {self.model!r}: {reason}")


def points(answer: str) -> float:
    """Return the total that an answer names, over 5 and within 0 to 1."""
    match = re.search(r"total score\W*(\d+(?:\.\d+)?)", answer, re.IGNORECASE)
    return min(max((float(match[1]) if match else _NO_SCORE) / 5, 0.0), 1.0)
