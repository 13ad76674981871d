"""Small generated texts for tiny.yaml: three domains in seconds, with no download.

    python examples/compare/texts.py OUT_DIR

writes OUT_DIR/NAME.train.jsonl and OUT_DIR/NAME.valid.jsonl, one {"text": ...} per line: public (work orders and sums),
arithmetic (worked problems) and clinic (discharge notes of a fictional hospital). All of it is invented.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
from generated import arithmetic_document, clinic_document, sums, work_order  # noqa: E402

from flexolmo_megatron.files import atomic_file  # noqa: E402

DOMAINS: dict[str, tuple[Callable[[random.Random], str], ...]] = {
    "public": (work_order, sums),
    "arithmetic": (arithmetic_document,),
    "clinic": (clinic_document,),
}
DOCUMENTS = {"train": 300, "valid": 20}


def write_texts(out: Path, seed: int = 0) -> None:
    """Write all files into ``out``, over those of an earlier run."""
    out.mkdir(parents=True, exist_ok=True)
    for domain, kinds in DOMAINS.items():
        r = random.Random(f"{seed} {domain}")  # a domain does not depend on the others
        for split, count in DOCUMENTS.items():
            with atomic_file(out / f"{domain}.{split}.jsonl", "w") as file:
                for number in range(count):
                    file.write(json.dumps({"text": kinds[number % len(kinds)](r)}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the texts of three small invented domains.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to write to; existing texts are replaced")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every choice (default: %(default)s)")
    args = parser.parse_args()
    write_texts(args.out, args.seed)


if __name__ == "__main__":
    main()
