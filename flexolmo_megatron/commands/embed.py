"""``flexolmo embed``: documents to a domain vector, and the published anchor."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexolmo_megatron.commands.documents import add_text_key_option
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.files import check_free

if TYPE_CHECKING:
    import numpy as np

    from flexolmo_megatron.convert.lazy import LazyModel
    from flexolmo_megatron.domain.embed import Embedder
    from flexolmo_megatron.domain.vector import DomainVector


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "embed", help="documents -> domain vector",
        description="Average the embeddings of a sample of documents: the domain vector that a router row starts "
                    "from. With --publish, for public documents, also write the published anchor that data owners "
                    "train against. The same command goes on with a run that was stopped, from FILE.state, which "
                    "stays with the owner (and FILE.public.state, with --public).")
    parser.add_argument("docs", nargs="+", metavar="DOCS",
                        help="file (.jsonl, .jsonl.gz, .jsonl.zst, .parquet) or quoted pattern, as in "
                             "'notes/**/*.jsonl'")
    parser.add_argument("--anchor", required=True, metavar="PATH",
                        help="the dense public model (coordinator) or the published anchor (data owner)")
    parser.add_argument("--out", required=True, metavar="FILE",
                        help="the domain vector, an .npz file; replaced if it exists")
    parser.add_argument("--embedder", default="anchor", metavar="NAME",
                        help="anchor (mean hidden state of the anchor, a row for each layer), or the name or folder of "
                             "a sentence-transformers or GritLM model (one row for all layers); all owners of one "
                             "anchor must use the same (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=1000, metavar="N",
                        help="documents to sample; all where there are fewer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N",
                        help="tokens of a document that are read; of another embedder than the anchor at most its "
                             "longest sequence (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N",
                        help="documents embedded at once: affects speed and memory alone (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="NORM",
                        help="Euclidean norm of each row; a router starts the more decided, the larger it is "
                             "(default: %(default)s)")
    parser.add_argument("--centre", action="store_true",
                        help="keep of each row only what tells it from the anchor's own, with the norm of --scale: the "
                             "owner's router row starts at the anchor's plus that (data owner, published anchor)")
    parser.add_argument("--public", nargs="+", metavar="DOCS",
                        help="public documents, given like DOCS: the rows become linear discriminants of the owner's "
                             "hidden states against theirs, log-likelihood ratios that hold beside rows of owners who "
                             "never met; the router row starts at the anchor's plus that, the bias at the "
                             "discriminant's (data owner, published anchor, --embedder anchor; --scale is then a "
                             "factor). FILE then also holds the mean hidden state of DOCS, for expert.drift_coeff: it "
                             "is for the owner's run, no package has it")
    add_text_key_option(parser)
    parser.add_argument("--max-bad", type=int, default=100, metavar="N",
                        help="how many empty or broken documents are skipped before the run stops "
                             "(default: %(default)s)")
    privacy = parser.add_argument_group(
        "differential privacy (off by default)",
        "Clip every document's embedding and add Gaussian noise to their mean, so that the vector says almost nothing "
        "about any single document. It does not hide the domain, nor protect what the expert's weights learn; two "
        "vectors of the same documents cost twice the epsilon.")
    privacy.add_argument("--epsilon", type=float, metavar="E",
                         help="turns it on: the larger, the less noise and the less private; replacing one document "
                              "changes the chance of any outcome by a factor of at most exp(E), up to --delta")
    privacy.add_argument("--delta", type=float, metavar="D",
                         help="should be far below 1 / number of documents (default: 1e-6)")
    privacy.add_argument("--clip", type=float, metavar="NORM",
                         help="longest row of a document's embedding; longer ones are shortened. The default is "
                              "the norm of what other embedders give; with the anchor it averages directions alone "
                              "(default: 1)")
    parser.add_argument("--publish", metavar="DIR",
                        help="also write the published anchor, a FlexOlmo model with one expert, to this new directory")
    parser.add_argument("--format", choices=("hf", "megatron"), default="hf",
                        help="of the published anchor: hf is safetensors and JSON alone, which also other programs "
                             "open without running code (default: %(default)s)")
    parser.set_defaults(run=run)


def _check_targets(args: argparse.Namespace, anchor: "LazyModel") -> None:
    """Refuse before the long work what would fail after it."""
    from flexolmo_megatron.domain.embed import check_options
    from flexolmo_megatron.training.documents import check_apart, find_files

    card = anchor.card
    if args.publish and card.kind != "dense":
        raise FlexOlmoError(f"--publish needs a dense model, {args.anchor} is a {card.kind} model with the experts "
                            f"{', '.join(card.expert_names)}")
    if args.public and (card.kind == "dense" or args.publish or args.centre or args.epsilon is not None
                        or args.embedder != "anchor"):
        raise FlexOlmoError(f"--public makes discriminants beside a published anchor, of its own hidden states: "
                            f"expected one, --embedder anchor, and neither --publish nor --centre nor --epsilon; "
                            f"{args.anchor} is a {card.kind} model, the embedder {args.embedder}")
    if args.centre and (card.kind == "dense" or args.publish):
        raise FlexOlmoError(f"--centre compares with the rows of a published anchor: expected one, without --publish; "
                            f"{args.anchor} is a {card.kind} model")
    if args.public:
        check_apart(find_files(args.docs), find_files(args.public))
    check_options(args.documents, args.seed, args.max_tokens, args.batch_size, args.scale)
    if not Path(args.out).resolve().parent.is_dir():
        raise FlexOlmoError(f"--out {args.out}: the folder {Path(args.out).parent} does not exist")
    for path in (args.out, f"{args.out}.state", f"{args.out}.public.state"):
        if Path(path).is_dir():
            raise FlexOlmoError(f"--out {args.out}: {path} is a folder; expected the name of a file")
    if args.publish:
        check_free(args.publish)


def _sample(args: argparse.Namespace, patterns: Sequence[str]) -> list[str]:
    from flexolmo_megatron.domain.sample import reservoir_sample
    from flexolmo_megatron.training.documents import BadDocuments, stream_documents
    from flexolmo_megatron.training.progress import with_progress

    bad = BadDocuments(args.max_bad)
    stream = (document.text for document in stream_documents(patterns, args.text_key, bad))
    texts = reservoir_sample(with_progress(stream, lambda text: len(text.encode())), args.documents, args.seed)
    if bad.counts:
        print(f"skipped {bad.report()}", file=sys.stderr)
    if not texts:
        raise FlexOlmoError(f"{' '.join(patterns)}: no document; expected at least one")
    return texts


def _made_by(record: Mapping[str, Any]) -> str:
    return ", ".join(str(record[key]) for key in ("embedder", "reading") if key in record)


def _compare(vector: "DomainVector", anchor: "LazyModel") -> None:
    """Print how close the rows are to the anchor's own, and whether they can be compared at all."""
    import torch

    from flexolmo_megatron.domain.publish import public_rows
    from flexolmo_megatron.domain.vector import same_embedder
    from flexolmo_megatron.untrusted import printable

    public = public_rows(anchor)
    if public is None or vector.centred:
        return
    rows = torch.from_numpy(vector.vectors)
    cosines = torch.nn.functional.cosine_similarity(rows, public, dim=-1)
    print("cosine similarity with the public row, by layer: " + " ".join(f"{value:.4f}" for value in cosines))
    theirs, ours = anchor.card.experts[0].router, vector.record()
    if theirs.get("embedder") and not same_embedder(theirs, ours):
        print(f"warning: the anchor's public row was made with {printable(_made_by(theirs))}, this vector with "
              f"{_made_by(ours)}: such rows have nothing to do with each other", file=sys.stderr)


def _centre(anchor: "LazyModel", embedder: "Embedder") -> "np.ndarray":
    """The anchor's rows, which must be of the same embedder."""
    from flexolmo_megatron.domain.publish import public_rows
    from flexolmo_megatron.domain.vector import embedder_record, same_embedder
    from flexolmo_megatron.untrusted import shown

    theirs, ours = anchor.card.experts[0].router, embedder_record(embedder.name, embedder.digest, embedder.reading)
    if not same_embedder(theirs, ours):
        raise FlexOlmoError(f"--centre: the anchor's row was made with {shown(_made_by(theirs))}, this vector would be "
                            f"with {_made_by(ours)}: expected the same embedder that reads in the same way")
    rows = public_rows(anchor).numpy()
    return rows if (rows != rows[0]).any() else rows[:1]


def run(args: argparse.Namespace) -> None:
    """Run ``flexolmo embed``."""
    import numpy as np

    from flexolmo_megatron.convert.model import open_model, save_model
    from flexolmo_megatron.domain.embed import domain_vector, open_embedder
    from flexolmo_megatron.domain.privacy import chosen_mechanism
    from flexolmo_megatron.domain.publish import dense_digest, publish_anchor
    from flexolmo_megatron.domain.vector import save_vector
    from flexolmo_megatron.exchange.digest import model_digest

    privacy = chosen_mechanism(args.epsilon, args.delta, args.clip)
    anchor = open_model(args.anchor)
    _check_targets(args, anchor)
    texts = _sample(args, args.docs)
    public_texts = _sample(args, args.public) if args.public else None
    digest = dense_digest(anchor)
    embedder = open_embedder(args.embedder, anchor, digest, args.max_tokens)
    unfinished, unfinished_public = Path(f"{args.out}.state"), Path(f"{args.out}.public.state")
    public = None
    if public_texts:
        from flexolmo_megatron.domain.discriminant import public_states

        public = public_states(embedder, public_texts, args.batch_size, unfinished_public)
    vector = domain_vector(embedder, texts, hidden_size=anchor.card.model.hidden_size, dense_digest=digest,
                           seed=args.seed, batch_size=args.batch_size, norm=args.scale, privacy=privacy,
                           centre=_centre(anchor, embedder) if args.centre else None, public=public,
                           resume=unfinished)
    save_vector(vector, args.out)
    for file in (unfinished, unfinished_public):
        file.unlink(missing_ok=True)
    rows, width = vector.vectors.shape
    kind = f"with norm {vector.norm:g}" if public is None else f"that are discriminants times {vector.norm:g}"
    print(f"{args.out}: {rows} row{'s' * (rows > 1)} of {width} numbers {kind}, by {vector.record()['embedder']}")
    if public is not None:
        margins = np.einsum("lh,lh->l", vector.vectors, public.mean_Lh) + vector.biases
        print("mean of the owner's logit less the anchor's on the public documents, by layer: "
              + " ".join(f"{margin:.2f}" for margin in margins))
    print(f"{vector.documents:,} documents averaged, {vector.dropped:,} dropped because their embedding was not finite")
    if privacy:
        sigma = privacy.sigma(vector.documents, rows)
        print(f"private for epsilon {privacy.epsilon:g} and delta {privacy.delta:g} if one document is replaced: noise "
              f"of standard deviation {sigma:.3g}, so a row whose norm is at most {privacy.clip:g} got noise of a norm "
              f"up to about {sigma * width**0.5:.3g}")
    _compare(vector, anchor)
    if args.publish:
        published = publish_anchor(anchor, vector)
        save_model(published, args.publish, args.format)
        print(f"{args.publish}: published anchor, digest {model_digest(published)}")
