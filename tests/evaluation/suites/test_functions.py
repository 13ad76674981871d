"""Metrics and documents of the suite's own tasks, and the judge, by hand."""

import fcntl
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.evaluation.suites.code import passes
from flexolmo_megatron.evaluation.suites.functions import (
    DOCS,
    boxed,
    code_passes,
    coqa_f1,
    judged,
    math_answer,
    word_f1,
    word_overlap,
)
from flexolmo_megatron.evaluation.suites.judge import Judge, points


def test_word_f1():
    assert word_f1("The cat sat.", "a cat") == pytest.approx(2 * 1 / (2 + 1))
    assert word_f1("dog", "cat") == 0 and word_f1("A the", "") == 1
    assert word_f1("b b c", "b c c") == pytest.approx(2 * 2 / 6)
    assert word_overlap({"golds": ["red car", "The Cat"]}, [" cat!"]) == {"f1": 1, "exact_match": 1}


def test_math_answers():
    assert boxed("so \\boxed{1} or \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}" and boxed("no") is None
    doc = {"solution": "it is \\boxed{\\dfrac{1}{2}}"}
    for answer, right in (("\\boxed{\\frac{1}{2}}", 1), ("The final answer is 2.", 0), ("", 0),
                          ("The final answer is $\\tfrac{1}{2}$. I hope it is correct.", 1)):
        assert math_answer(doc, [answer]) == {"exact_match": right}, answer
    assert math_answer({"solution": "\\boxed{1,234}"}, ["Final answer: is 1234"]) == {"exact_match": 0}
    assert math_answer({"solution": "\\boxed{1,234}"}, ["the Final Answer is: $1234$."]) == {"exact_match": 1}


def test_programs_are_run_with_limits():
    assert passes("assert 1 + 1 == 2")
    assert not passes("import sys\nsys.exit(0)\nassert False") and not passes("def f(): return 5\n\nexit()")
    assert not passes("assert 1 + 1 == 3") and not passes("while True: pass", seconds=1) and not passes("x = (")
    assert not passes("\0")
    (doc,) = DOCS["humaneval"]([{"prompt": "def f(x):\n", "test": "def check(g):\n    assert g(2) == 4",
                                 "entry_point": "f"}])
    assert code_passes(doc, [["    return x * x", "    return x"]]) == {"pass_at_1": 0.5}


@pytest.mark.parametrize(("rest", "passed"), [("", True), ("assert False", False), ("while True: pass", False)])
def test_no_process_outlives_its_program(tmp_path, rest, passed):
    program = f"""
import fcntl, os, time
lock = os.open({str(tmp_path / 'lock')!r}, os.O_CREAT | os.O_RDWR)
fcntl.flock(lock, fcntl.LOCK_EX)
if not os.fork():
    time.sleep(30)
{rest}"""
    assert passes(program, seconds=2) == passed
    began = time.monotonic()
    with (tmp_path / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # held until the last process that the program started has ended
    assert time.monotonic() - began < 15


def test_coqa():
    row = {"story": "A cat sat.", "questions": {"input_text": ["Who?", "What did it do?"]},
           "answers": {"input_text": ["A cat", "It sat."]},
           "additional_answers": {"0": {"input_text": ["cat", "it SAT."]}, "1": {"input_text": ["cat", "sat down"]}}}
    (doc,) = DOCS["coqa"]([row])
    assert doc == {"question": "A cat sat.\n\nQ: Who?\n\nA: A cat\n\nQ: What did it do?\n\nA:",
                   "golds": ["It sat.", "sat down"]}
    assert coqa_f1(doc, [" sat\n\nA: no"]) == {"f1": pytest.approx((2 / 3 + 2 / 3) / 2)}
    assert coqa_f1(doc, ["it sat"]) == {"f1": pytest.approx((1 / 2 + 1) / 2)}
    assert coqa_f1({"golds": ["yes"]}, ["Yes."]) == {"f1": 1}


def test_documents_of_sciriff():
    row = {"_instance_id": "bioasq_yesno_qa:test:1", "input": "Do this.\n\nQuestion: is it?\n\nContext: it\nis.",
           "output": "yes"}
    (doc,) = DOCS["sciriff_bioasq_yesno_qa"]([row, row | {"_instance_id": "pubmedqa_qa:test:1"}])
    assert doc["question"] == "Do this.\n\nContext: it is.\n\nQuestion: is it? Answer with Yes or No.\n\nAnswer:"
    assert doc["answer"] == "Yes" and doc["choices"] == ["Yes", "No"]
    (doc,) = DOCS["sciriff_pubmedqa_qa"]([{"input": "Do.\n\nContext: c\n\nQuestion: q?\n\nAnswer:", "output": "MAYBE"}])
    assert doc["question"].endswith("Question: q? Answer with Yes, No, or Maybe.\n\nAnswer:")
    assert doc["answer"] == "Maybe"


def test_documents_of_news_and_poems():
    (doc,) = DOCS["news"]([{"text": " ".join(f"w{index}" for index in range(40)) + "\n\nend"}])
    assert doc["question"].endswith(" w31") and doc["answer"].startswith("w32 ")
    assert doc["reference"].endswith("w39 end")
    lines = [f"line {index} " + "word " * 10 for index in range(8)]
    poem = {"content": "\r\n".join(lines), "age": "Modern", "poem name": "Name"}
    (doc,) = DOCS["poems"]([poem, poem | {"content": "too short"}])
    assert doc["question"].endswith("\n".join(lines[:4]) + "\n") and "Poem Title: Name" in doc["question"]
    assert doc["answer"] == "\n".join(lines[4:])


@pytest.mark.parametrize(("answer", "expected"), [
    ("reasons\nTotal score: 4", 0.8), ("**Total score:** 2.5", 0.5), ("Total score: 9", 1), ("no idea", 0.6)])
def test_points(answer, expected):
    assert points(answer) == pytest.approx(expected)


class Endpoint(BaseHTTPRequestHandler):
    """Gives as many points as the generated text has words; fails first."""

    seen: list = []
    failures = 1

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.seen.append((self.path, self.headers.get("Authorization"), body))
        if Endpoint.failures:
            Endpoint.failures -= 1
            self.send_error(503)
            return
        if body["model"] == "unknown":
            self.send_error(404)
            return
        words = body["messages"][0]["content"].rsplit("Generated poem:\n")[-1].split()
        answer = json.dumps({"choices": [{"message": {"content": f"Total score: {len(words)}"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def url():
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    Endpoint.seen, Endpoint.failures = [], 1
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_judge_is_asked_about_every_sample(url, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    judge = Judge(url, "a-judge", "SOME_KEY", workers=2)
    doc = {"kind": "poem", "reference": "the real one", "prefix": "one ", "about": "Poem Title: T"}
    assert judged(judge)(doc, [["two", "two three four"]]) == {"judge": pytest.approx((2 / 5 + 4 / 5) / 2)}
    assert len(Endpoint.seen) == 3, "one was asked again"
    path, authorization, body = Endpoint.seen[-1]
    assert path == "/v1/chat/completions" and authorization == "Bearer secret" and body["model"] == "a-judge"
    text = body["messages"][0]["content"]
    assert "Poem Title: T" in text and "the real one" in text and body["temperature"] == 0


def test_a_judge_that_refuses(url):
    Endpoint.failures = 0
    with pytest.raises(FlexOlmoError, match=r"the judge at .*/v1/chat/completions gave no answer for model 'unknown': "
                                            "status 404"):
        Judge(url, "unknown").ask("hello")
    assert len(Endpoint.seen) == 1
    with pytest.raises(FlexOlmoError, match="gave no answer"):
        Judge("http://127.0.0.1:9", "m", attempts=1).ask("hello")
