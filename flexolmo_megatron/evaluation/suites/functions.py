"""What suite files name under ``process_docs`` and ``process_results``: Python that a YAML file cannot hold.

``process_docs`` turns a data set's rows into documents; ``process_results`` a document and the model's answers into
numbers, by metric.
"""

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flexolmo_megatron.evaluation.suites.code import passes
from flexolmo_megatron.evaluation.suites.judge import Judge

Docs = Callable[[Iterable[dict]], list[dict]]
Results = Callable[[dict, Sequence[Any]], dict[str, float]]


def _answers(results: Sequence[Any]) -> list[str]:
    """All answers to one document: of repeated requests, the filter leaves a list."""
    return list(results[0]) if isinstance(results[0], list | tuple) else list(results)


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces, as SQuAD's evaluation does (Rajpurkar 2016)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words of ``answer``, normalised."""
    words, expected = normalized(answer).split(), normalized(gold).split()
    common = sum((Counter(words) & Counter(expected)).values())
    return 2 * common / (len(words) + len(expected)) if common else float(words == expected)


def word_overlap(doc: dict, results: Sequence[Any]) -> dict[str, float]:
    """F1 and exact match with the best of ``doc["golds"]``."""
    answer = _answers(results)[0]
    return {"f1": max(word_f1(answer, gold) for gold in doc["golds"]),
            "exact_match": max(float(normalized(answer) == normalized(gold)) for gold in doc["golds"])}


def coqa_f1(doc: dict, results: Sequence[Any]) -> dict[str, float]:
    """F1 with the best of ``doc["golds"]`` but one, the mean over which one is left out: CoQA's own way to score."""
    answer, golds = _answers(results)[0].strip().split("\n")[0], doc["golds"]
    scores = [word_f1(answer, gold) for gold in golds]
    best = [max(scores[:index] + scores[index + 1:], default=scores[index]) for index in range(len(scores))]
    return {"f1": sum(best) / len(best)}


def rouge_l(doc: dict, results: Sequence[Any]) -> dict[str, float]:
    """ROUGE-L F1 with ``doc["answer"]``."""
    from rouge_score.rouge_scorer import RougeScorer

    score = RougeScorer(["rougeL"], use_stemmer=True).score(doc["answer"], _answers(results)[0])
    return {"rougeL_f1": score["rougeL"].fmeasure}


def boxed(text: str) -> str | None:
    """What the last ``\\boxed{...}`` of ``text`` holds."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for place in range(begin, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if not depth:
            return text[begin:place]
    return None


def _math_form(text: str) -> str:
    for old, new in (("\\left", ""), ("\\right", ""), ("\\!", ""), ("\\,", ""), ("\\;", ""), ("\\ ", ""), ("\\$", ""),
                     ("$", ""), ("\\%", ""), ("%", ""), ("tfrac", "frac"), ("dfrac", "frac"), (" ", "")):
        text = text.replace(old, new)
    text = re.sub(r"\\(?:text|mbox|mathrm)\{[^}]*\}$", "", text)
    text = re.sub(r"(\d),(?=\d{3}(\D|$))", r"\1", text)
    return text.rstrip(".")


def math_answer(doc: dict, results: Sequence[Any]) -> dict[str, float]:
    """Exact match of the final answer ("The final answer is ..." or the last ``\\boxed``), in a normal form."""
    answer = _answers(results)[0]
    found = re.search(r"[Ff]inal [Aa]nswer is:?\s*(.*?)(?:\.\s|\.$|\n|$|\. I hope)", answer)
    given = boxed(answer) or (found[1] if found else answer)
    return {"exact_match": float(_math_form(given) == _math_form(boxed(doc["solution"]) or doc["solution"]))}


def code_passes(doc: dict, results: Sequence[Any]) -> dict[str, float]:
    """Share of the answers that pass the tests: pass@1, of several samples without bias (Chen et al. 2021)."""
    answers = _answers(results)
    return {"pass_at_1": sum(passes(f"{doc['before']}{answer}\n{doc['after']}\n") for answer in answers) / len(answers)}


def humaneval_docs(rows: Iterable[dict]) -> list[dict]:
    return [{"question": row["prompt"], "before": row["prompt"],
             "after": f"{row['test']}\ncheck({row['entry_point']})", "answer": ""} for row in rows]


def mbpp_docs(rows: Iterable[dict]) -> list[dict]:
    return [{"question": row.get("text") or row["prompt"], "first_test": row["test_list"][0], "before": "",
             "after": row.get("test") or "\n".join([*(row.get("test_imports") or []), *row["test_list"]]),
             "answer": row["code"]} for row in rows]


def coqa_docs(rows: Iterable[dict]) -> list[dict]:
    """The last question of each story, in the words of the harness, whose own task transformers 5 cannot run."""
    docs = []
    for row in rows:
        questions, answers = row["questions"]["input_text"], row["answers"]["input_text"]
        turns = "".join(f"Q: {question}\n\nA: {answer}\n\n"
                        for question, answer in zip(questions[:-1], answers[:-1], strict=True))
        golds: dict[str, str] = {}
        for given in (answers, *(other["input_text"] for other in (row.get("additional_answers") or {}).values())):
            golds.setdefault(given[-1].lower(), given[-1])
        docs.append({"question": f"{row['story']}\n\n{turns}Q: {questions[-1]}\n\nA:", "golds": list(golds.values())})
    return docs


def news_docs(rows: Iterable[dict]) -> list[dict]:
    """Articles that begin with their first 32 words."""
    docs = []
    for row in rows:
        words = row["text"].split()
        prefix = " ".join(words[:32])
        docs.append({"question": f"Breaking News:\n{prefix}", "prefix": f"{prefix} ", "about": "",
                     "kind": "news article", "reference": " ".join(words), "answer": " ".join(words[32:])})
    return docs


def poem_docs(rows: Iterable[dict]) -> list[dict]:
    """Poems of 64 to 128 words and one stanza that begin with their first four lines; always in the same order."""
    usable = [row for row in rows if 64 <= len(row["content"].split()) <= 128
              and "\r\n\r\n" not in row["content"] and len(row["content"].split("\r\n")) > 4]
    random.Random(2025).shuffle(usable)
    docs = []
    for row in usable:
        lines = row["content"].split("\r\n")
        about = f"Poem Genre: {row['age']}\nPoem Title: {row['poem name']}"
        prefix = "\n".join(lines[:4]) + "\n"
        docs.append({"question": f"{about}\n\n{prefix}", "prefix": prefix, "about": about, "kind": "poem",
                     "reference": "\n".join(lines), "answer": "\n".join(lines[4:])})
    return docs


def _sciriff(task: str, question_first: bool, suffix: str, labels: dict[str, str] | None) -> Docs:
    def documents(rows: Iterable[dict]) -> list[dict]:
        docs = []
        for row in rows:
            owner, colon, _ = str(row.get("_instance_id", "")).partition(":")
            if colon and owner != task:
                continue
            parts = row["input"].strip().removesuffix("Answer:").strip().split("\n\n")
            if len(parts) < 3:
                continue
            if question_first:
                parts = [parts[0], *parts[2:], parts[1]]
            query = "\n\n".join(" ".join(part.split()) for part in parts) + suffix + "\n\nAnswer:"
            answer = labels[row["output"].strip().lower()] if labels else row["output"]
            docs.append({"question": query, "answer": answer, "choices": list(labels.values()) if labels else []})
        return docs
    return documents


_YES_NO = {"yes": "Yes", "no": "No"}
DOCS: dict[str, Docs] = {
    "humaneval": humaneval_docs, "mbpp": mbpp_docs, "news": news_docs, "poems": poem_docs,
    "sciriff_bioasq_factoid_qa": _sciriff("bioasq_factoid_qa", True, "", None),
    "sciriff_bioasq_general_qa": _sciriff("bioasq_general_qa", True, "", None),
    "sciriff_bioasq_yesno_qa": _sciriff("bioasq_yesno_qa", True, " Answer with Yes or No.", _YES_NO),
    "sciriff_covid_deepset_qa": _sciriff("covid_deepset_qa", False, "", None),
    "sciriff_pubmedqa_qa": _sciriff("pubmedqa_qa", False, " Answer with Yes, No, or Maybe.",
                                    _YES_NO | {"maybe": "Maybe"}),
    "coqa": coqa_docs,
    "squad": lambda rows: [row | {"golds": row["answers"]["text"]} for row in rows],
    "nq": lambda rows: [row | {"golds": row["answer"]} for row in rows],
    "trivia": lambda rows: [row | {"golds": row["answer"]["aliases"]} for row in rows],
}
RESULTS: dict[str, Results] = {"word_overlap": word_overlap, "coqa": coqa_f1, "rouge_l": rouge_l,
                               "math": math_answer, "code": code_passes}
JUDGED = "judge"
"""In place of one of ``RESULTS``: what a judge says."""


def judged(judge: Judge) -> Results:
    """The mean of the judge's points for all samples of a document."""
    def results(doc: dict, answers: Sequence[Any]) -> dict[str, float]:
        scores = judge.score(doc["kind"], doc["reference"], [doc["prefix"] + text for text in _answers(answers)],
                             doc["about"])
        return {"judge": sum(scores) / len(scores)}
    return results
