"""``flexolmo proxy``: the public documents that look most like an owner's."""

import argparse
import sys

from flexolmo_megatron.commands.documents import add_text_key_option, add_where_options


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "proxy", help="pick public documents that look like an owner's",
        description="Train a classifier of the owner's against public documents and pick the public documents that "
                    "look most like the owner's, up to a token budget, without copies and near-copies of the owner's "
                    "own. The coordinator may tune the router on them. Writes a new folder with proxies.jsonl, "
                    "report.json and scores.png, which hold nothing of the owner's text. The same command goes on "
                    "with a run that was stopped, from OUT.state, which stays with the owner. Documents are read and "
                    "scored in shards, by datatrove.")
    parser.add_argument("owner", nargs="+", metavar="OWNER_TEXT",
                        help="the owner's documents: files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet) or quoted "
                             "patterns, as in 'notes/**/*.jsonl'")
    parser.add_argument("--public", nargs="+", required=True, metavar="PUBLIC_TEXT",
                        help="public documents to pick from, the same kinds of files")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder")
    parser.add_argument("--tokens", type=int, required=True, metavar="N",
                        help="budget: the proxies have at most this many tokens")
    parser.add_argument("--tokenizer", default="byte", metavar="NAME",
                        help="that counts them: byte, or the name or folder of a Hugging Face tokenizer "
                             "(default: %(default)s)")
    parser.add_argument("--classifier", default="linear", metavar="NAME",
                        help="linear (logistic regression on hashed word 1- and 2-grams), or the name or folder of a "
                             "transformers encoder, which is then fine-tuned (the paper's: "
                             "Snowflake/snowflake-arctic-embed-xs) (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=50_000, metavar="N",
                        help="documents of each side to train the classifier on; all where there are fewer; a tenth of "
                             "them is held out to measure it (default: %(default)s)")
    parser.add_argument("--jaccard", type=float, default=0.7, metavar="J",
                        help="similarity of the sets of word trigrams, above 0 to 1, from which a public document is "
                             "taken for a near-copy of one of the owner's (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of samples and training (default: %(default)s)")
    add_where_options(parser, "A transformers encoder scores in one process, on the GPU where there is one")
    add_text_key_option(parser)
    parser.add_argument("--max-bad", type=int, default=100, metavar="N",
                        help="how many empty or broken documents of a side are skipped before the run stops "
                             "(default: %(default)s)")
    encoder = parser.add_argument_group("options for a transformers encoder")
    encoder.add_argument("--lr", type=float, default=3e-6, metavar="RATE",
                         help="peak learning rate of AdamW (default: %(default)s)")
    encoder.add_argument("--epochs", type=int, default=1, metavar="N",
                         help="passes over the training documents (default: %(default)s)")
    encoder.add_argument("--batch-size", type=int, default=32, metavar="N",
                         help="documents of a training step, and scored at once (default: %(default)s)")
    encoder.add_argument("--max-tokens", type=int, default=512, metavar="N",
                         help="tokens of a document that it reads (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run ``flexolmo proxy``."""
    from flexolmo_megatron.domain.proxy import ProxyOptions, select_proxies
    from flexolmo_megatron.shards.run import Where
    from flexolmo_megatron.training.tokenizer import tokenizer_spec

    options = ProxyOptions(
        tokens=args.tokens, tokenizer=tokenizer_spec(args.tokenizer), classifier=args.classifier,
        documents=args.documents, seed=args.seed, jaccard=args.jaccard, where=Where.of(args.workers, args.slurm),
        text_key=args.text_key, max_bad=args.max_bad, learning_rate=args.lr, epochs=args.epochs,
        batch_size=args.batch_size, max_tokens=args.max_tokens)
    result = select_proxies(args.owner, args.public, args.out, options)
    report = result.report
    for side, bad in report["skipped"].items():
        if bad:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in bad.items())
            print(f"skipped unusable documents of the {side} side: {kinds}", file=sys.stderr)
    held_out, proxies, duplicates = report["held_out"], report["proxies"], report["duplicates"]
    print(f"classifier {report['classifier']['name']}: held-out accuracy {100 * held_out['accuracy']:.1f} %, AUC "
          f"{held_out['auc']:.4f}, on {held_out['owner_documents']:,} documents of the owner's and "
          f"{held_out['public_documents']:,} public ones")
    if result.scored:
        rate = result.scored / result.seconds
        where = ("Slurm, the queue included" if result.where.slurm else
                 f"{result.where.workers} process{'es' * (result.where.workers > 1)}")
        print(f"scored {result.scored:,} public documents in {result.seconds:,.1f} s: {rate:,.0f} documents/s with "
              f"{where}")
    print(f"excluded, as they are documents of the owner's: copies {duplicates['copies_excluded']:,}, near-copies "
          f"{duplicates['near_copies_excluded']:,} (Jaccard similarity of at least {duplicates['jaccard']:g})")
    print(f"{args.out}: {proxies['documents']:,} proxies of {proxies['tokens']:,} tokens "
          f"({proxies['text_bytes'] / 1e6:,.1f} MB), of {report['public_documents']:,} public documents; lowest score "
          f"{proxies['lowest_score']:g}")
    if proxies["highest_score"] < 0:
        print("note: no public document looks like the owner's: the classifier takes all of these proxies for public "
              "ones", file=sys.stderr)
    if proxies["exhausted"]:
        print("note: all public documents were taken before the budget was used, however little they look like the "
              "owner's", file=sys.stderr)
