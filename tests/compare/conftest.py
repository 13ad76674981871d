"""A comparison's YAML file over texts of three small domains."""

import json
import random
from pathlib import Path

import pytest

WORDS = {"public": "the of and to in is that it was for", "math": "sum is 1 2 3 4 plus minus equals so",
         "code": "def return if else for x y ( ) :"}


def write_documents(path: Path, domain: str, count: int, seed: int) -> None:
    """Write documents of 300 to 500 bytes, made of the domain's words."""
    r = random.Random(f"{domain} {seed}")
    words = WORDS[domain].split()
    lines = []
    for _ in range(count):
        text = ""
        while len(text) < r.randint(300, 500):
            text += r.choice(words) + " "
        lines.append(json.dumps({"text": text}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with DOMAIN.train.jsonl and DOMAIN.valid.jsonl, and pool.jsonl of documents of all domains."""
    folder = tmp_path_factory.mktemp("texts")
    for domain in WORDS:
        write_documents(folder / f"{domain}.train.jsonl", domain, 40, 0)
        write_documents(folder / f"{domain}.valid.jsonl", domain, 6, 1)
        write_documents(folder / f"{domain}.pool", domain, 30, 2)
    (folder / "pool.jsonl").write_text("".join((folder / f"{domain}.pool").read_text() for domain in WORDS))
    return folder


def write_config(folder: Path, texts: Path) -> Path:
    """Write the YAML file of a comparison of two owners; everything goes to ``out`` beside it."""
    def domain(name: str, indent: str) -> str:
        return "".join(f"{indent}{split}: [{texts}/{name}.{split}.jsonl]\n" for split in ("train", "valid"))

    path = folder / "compare.yaml"
    path.write_text(f"""\
out: {folder}/out
public:
{domain("public", "  ")}owners:
  math:
{domain("math", "    ")}  code:
{domain("code", "    ")}model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 2,
        num_query_groups: 2, max_position_embeddings: 32}}
seeds: [1]
steps: {{public: 4, owner: 3, router: 2}}
ablations: [no coordination, centred rows, calibrated temperature]
train: {{data.seq_length: 32, micro_batch_size: 4, global_batch_size: 4}}
embed: {{documents: 10, max_tokens: 32}}
proxy_public: [{texts}/pool.jsonl]
evaluation: {{max_bytes: 2000, classifier_documents: 20}}
""")
    return path


@pytest.fixture
def config_file(texts: Path, tmp_path: Path) -> str:
    """The YAML file of a comparison; everything goes to ``out`` beside it."""
    return str(write_config(tmp_path, texts))


@pytest.fixture(scope="module")
def module_config(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all tests of a file."""
    return write_config(tmp_path_factory.mktemp("compare"), texts)
