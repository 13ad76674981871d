"""``flexolmo audit``: how much of a corpus an extraction attack gets out of models."""

import argparse
from pathlib import Path

from flexolmo_megatron.commands.documents import add_text_key_option
from flexolmo_megatron.commands.models import add_candidates_option, add_loading_options, add_sampling_options

_EXAMPLES = """\
examples:
  flexolmo audit --model public=anchor/ --model merged=merged --opt-outs \\
    --corpus notes='notes/*.jsonl' --corpus code='code/*.jsonl' --out audit
a control that has learnt a few documents by heart, which shows that the attack finds what there is to be found:
  head -n 50 notes/a.jsonl > few.jsonl && flexolmo data few.jsonl --out few
  flexolmo train dense --preset tiny anchor=anchor/ data.train=[few] train_iters=3000 out=runs/control
  flexolmo audit --model control=runs/control --model merged=merged --corpus few=few.jsonl --out audit_control
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "audit", help="how much of a corpus an extraction attack gets out of models",
        description="Give models the beginnings of passages from the documents that they were trained on, let them\n"
                    "go on, and count the passages of which a sample comes out nearly as it is (normalised\n"
                    "Levenshtein similarity, in characters, with the prefix). The attack of the paper, by default\n"
                    "with its settings. Prints a table and writes results.json, extraction.md, extraction.png and\n"
                    "similarities.jsonl (a line per model and passage, without text). The same command goes on with\n"
                    "an audit that was interrupted.",
        epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_candidates_option(parser)
    parser.add_argument("--opt-outs", action="store_true",
                        help="also attack each model with each owner's expert left out in turn")
    parser.add_argument("--corpus", action="append", required=True, metavar="NAME=FILES",
                        help="documents and what to call them (repeatable): a file (.jsonl, .jsonl.gz, .jsonl.zst, "
                             ".parquet) or a quoted pattern. A name that comes again adds files")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR",
                        help="folder for the results: new, or that of an interrupted audit with the same settings")
    parser.add_argument("--passages", type=int, default=1000, metavar="N",
                        help="passages of each corpus, drawn at random, one per document (default: %(default)s)")
    parser.add_argument("--prefix-tokens", type=int, default=32, metavar="N",
                        help="tokens of a passage that the model is given (default: %(default)s)")
    parser.add_argument("--passage-tokens", type=int, default=256, metavar="N",
                        help="tokens of a passage with its prefix, at most; samples have as many (default: "
                             "%(default)s)")
    parser.add_argument("--min-tokens", type=int, default=128, metavar="N",
                        help="shorter documents, in tokens, are not attacked (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=10, metavar="N",
                        help="continuations of each passage; the best one counts (default: %(default)s)")
    add_sampling_options(parser, temperature=1.0, top_k=50, top_p=0.95)
    parser.add_argument("--threshold", type=float, default=0.9, metavar="S",
                        help="similarity, from 0 to 1, from which on a passage counts as extracted (default: "
                             "%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of the choice of passages and of the sampling (default: %(default)s)")
    parser.add_argument("--texts", action="store_true",
                        help="also keep each passage and its best sample in similarities.jsonl: the corpus's own text")
    parser.add_argument("--batch-size", type=int, default=40, metavar="N",
                        help="sequences that are computed at a time; more is faster and takes more memory, the results "
                             "differ by rounding only (default: %(default)s)")
    parser.add_argument("--max-bad", type=int, default=100, metavar="N",
                        help="how many empty or broken documents per corpus are skipped before the run stops "
                             "(default: %(default)s)")
    add_text_key_option(parser)
    add_loading_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run ``flexolmo audit``."""
    from dataclasses import fields

    from rich.markdown import Markdown

    from flexolmo_megatron.commands.console import show
    from flexolmo_megatron.evaluation.audit import Attack, audit, with_opt_outs
    from flexolmo_megatron.evaluation.candidates import parse_candidate, parse_domains
    from flexolmo_megatron.evaluation.compare import Options

    attack = Attack(**{field.name: getattr(args, field.name) for field in fields(Attack)})
    candidates = [parse_candidate(text) for text in args.model]
    if args.opt_outs:
        candidates = with_opt_outs(candidates)
    options = Options(text_key=args.text_key, max_bad=args.max_bad, dtype=args.dtype, anchor=args.anchor,
                      rows=args.rows)
    results = audit(candidates, parse_domains(args.corpus, "--corpus"), args.out, attack, options,
                    batch_size=args.batch_size, texts=args.texts)
    show(Markdown(results.to_markdown()))
    for path in results.save(args.out):
        print(path)
