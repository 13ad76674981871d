"""``flexolmo pack``, ``verify``, ``merge`` and ``inspect``: expert packages and what is made of them."""

import argparse
from typing import TYPE_CHECKING

from flexolmo_megatron.commands.models import add_rows_option
from flexolmo_megatron.errors import FlexOlmoError

if TYPE_CHECKING:
    from flexolmo_megatron.convert.lazy import LazyModel


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verbs to the command line."""
    _register_pack(subparsers)
    _register_verify(subparsers)
    _register_merge(subparsers)
    _register_inspect(subparsers)


def _register_pack(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "pack", help="an owner's checkpoint -> expert package",
        description="Write what a data owner hands to the coordinator: a new directory with manifest.json and "
                    "expert.safetensors. It holds the expert's weights and router row, and a summary of the run; never "
                    "any document text.")
    parser.add_argument("checkpoint", metavar="CKPT", help="training run of an expert, or one of its checkpoints")
    parser.add_argument("out", metavar="OUT", help="new directory for the package")
    parser.add_argument("--name", help="of the expert, what --experts will take: 1 to 64 of A-Z a-z 0-9 . _ - "
                                       "(default: the name that the run was given)")
    parser.add_argument("--owner", default="", metavar="TEXT", help="free text: who hands it over")
    parser.add_argument("--licence", default="", metavar="TEXT", help="free text: what may be done with it")
    parser.add_argument("--contact", default="", metavar="TEXT", help="free text: whom to ask")
    parser.add_argument("--anchor", metavar="PATH",
                        help="published anchor that the expert was trained against; needed only for a checkpoint that "
                             "does not record its digest")
    parser.add_argument("--domain-vector", metavar="FILE",
                        help="router row of a dense copy that was trained without coordination "
                             "(expert.coordination=false), whose feed-forward networks are then packed; needs --name "
                             "and --anchor, with which it is compared")
    parser.add_argument("--router-window", type=int, metavar="N",
                        help="with --domain-vector: positions over which routing logits are to be averaged, as "
                             "expert.router_window says for other owners (default: 1)")
    parser.set_defaults(run=run_pack)


def _register_verify(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "verify", help="check an expert package against an anchor",
        description="Read a package completely and say whether it may be merged: trained against this anchor, sizes "
                    "and dtype that fit it, intact, finite, and nothing else in its directory. Exit status 2 and one "
                    "sentence if not.")
    parser.add_argument("package", metavar="PACKAGE", help="directory of the package")
    parser.add_argument("--anchor", required=True, metavar="PATH", help="published anchor, or a model merged from it")
    parser.set_defaults(run=run_verify)


def _register_merge(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "merge", help="anchor + packages -> merged model",
        description="Put experts side by side, without training. Every package is verified while it is read; the "
                    "result appears complete, or not at all if a package is refused.",
        epilog="examples:\n  flexolmo merge --anchor anchor math/ code/ --out merged\n"
               "  flexolmo merge --model merged --remove math --add law/ --out other",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--anchor", metavar="PATH", help="published anchor to start from")
    start.add_argument("--model", metavar="PATH", help="merged model to start from; its experts stay as they are")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="packages to add, in the order of their experts")
    parser.add_argument("--add", nargs="+", action="extend", default=[], metavar="PACKAGE", help="more packages to add")
    parser.add_argument("--remove", nargs="+", action="extend", default=[], metavar="NAME",
                        help="experts of --model to leave out")
    parser.add_argument("--out", required=True, metavar="OUT", help="new directory for the merged model")
    parser.add_argument("--format", choices=("megatron", "hf"), default="megatron",
                        help="Megatron checkpoint or Hugging Face directory (default: %(default)s)")
    parser.add_argument("--top-k", type=int, metavar="K",
                        help="experts that are active for each token (default: 4, or all if there are fewer; a choice "
                             "made for --model is kept)")
    add_rows_option(parser)
    parser.add_argument("--drop-bias", action="store_true",
                        help="with --format hf: leave out a learned router bias, for which that format has no place")
    parser.set_defaults(run=run_merge)


def _register_inspect(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "inspect", help="what is in a checkpoint or package, or how similar domain vectors are",
        description="Show kind, architecture, number of parameters, dtype and size, and every expert with where it "
                    "came from; of a model whose router was tuned also on whom its router rows depend, and which "
                    "guarantee holds where an expert is left out. Reads headers only, unless --digest is given. "
                    "Of domain vectors (.npz), show how each was made and how similar they are.")
    parser.add_argument("path", nargs="+", metavar="PATH",
                        help="Megatron checkpoint, Hugging Face directory, training run or expert package; or any "
                             "number of domain vectors")
    parser.add_argument("--digest", action="store_true",
                        help="also read all tensors: compute a model's digest; check a package's sha256")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE",
                        help="of domain vectors: also draw where they lie, in two dimensions, as a PNG file")
    parser.set_defaults(run=run_inspect)


def run_pack(args: argparse.Namespace) -> None:
    """Run ``flexolmo pack``."""
    from flexolmo_megatron.convert.model import open_model, total_bytes
    from flexolmo_megatron.convert.progress import byte_progress
    from flexolmo_megatron.exchange.package import pack
    from flexolmo_megatron.exchange.verify import AnchorReference

    pair = open_model(args.checkpoint)
    anchor = None if args.anchor is None else open_model(args.anchor)
    if args.router_window is not None and args.domain_vector is None:
        raise FlexOlmoError(f"--router-window {args.router_window} without --domain-vector: a pair says itself what it "
                            "was trained with")
    if args.domain_vector is not None:
        pair = _uncoordinated(pair, anchor, args)
    digest = None
    if anchor is not None:
        with byte_progress(total_bytes(anchor), "digest of the anchor") as add:
            digest = AnchorReference.of(anchor, progress=add).digest
    name = args.name or (pair.card.experts[-1].name if pair.card.kind == "pair" else "")
    with byte_progress(total_bytes(pair), "pack") as add:
        manifest = pack(pair, digest, args.out, name=name, owner=args.owner, licence=args.licence, contact=args.contact,
                        progress=add)
    print(f"{args.out}: expert {manifest.name}, {total_bytes(pair) / 1e9:,.3f} GB, for anchor {manifest.anchor_digest}")


def _uncoordinated(dense: "LazyModel", anchor: "LazyModel | None", args: argparse.Namespace) -> "LazyModel":
    """What an owner who trained a dense copy (expert.coordination=false) hands over."""
    from flexolmo_megatron.config.card import ExpertRecord, check_expert_name
    from flexolmo_megatron.convert.variants import as_pair
    from flexolmo_megatron.domain.publish import dense_digest, owner_router
    from flexolmo_megatron.domain.vector import load_vector

    if dense.card.kind != "dense":
        raise FlexOlmoError(f"--domain-vector is for a dense copy, this checkpoint is of kind {dense.card.kind!r}")
    if args.name is None:
        raise FlexOlmoError("--domain-vector needs --name: a dense copy does not record the name of an expert")
    if anchor is None:
        raise FlexOlmoError("--domain-vector needs --anchor: a vector that was made with another one makes no router "
                            "row")
    check_expert_name(args.name)
    vector = load_vector(args.domain_vector)
    vector.check_fits(dense.card.model.num_layers, dense.card.model.hidden_size, args.domain_vector)
    vector.check_made_with(dense_digest(anchor), args.domain_vector, args.anchor)
    return as_pair(dense, owner_router(vector, anchor), ExpertRecord(args.name, router=vector.record()),
                   1 if args.router_window is None else args.router_window)


def run_verify(args: argparse.Namespace) -> None:
    """Run ``flexolmo verify``."""
    from flexolmo_megatron.commands.console import show
    from flexolmo_megatron.convert.model import open_model, total_bytes
    from flexolmo_megatron.convert.progress import byte_progress
    from flexolmo_megatron.exchange.inspect import describe, render
    from flexolmo_megatron.exchange.merge import compose
    from flexolmo_megatron.exchange.package import open_package
    from flexolmo_megatron.exchange.verify import AnchorReference, verify

    unread = open_package(args.package)  # refuse what can be refused before reading gigabytes
    anchor = open_model(args.anchor)
    compose(anchor, [unread])  # a name that is taken, or another router window
    with byte_progress(total_bytes(anchor), "digest of the anchor") as add:
        reference = AnchorReference.of(anchor, progress=add)
    with byte_progress(unread.num_bytes, "verify") as add:
        package = verify(args.package, reference, add)
    show(render(describe(args.package) | {"contents": "intact, all numbers finite"}))
    _report_positive_bias({package.manifest.name: package.positive_bias_layers()})
    print(f"accepted: {args.package} may be merged into {args.anchor}")


def run_merge(args: argparse.Namespace) -> None:
    """Run ``flexolmo merge``."""
    import sys
    from functools import partial

    from flexolmo_megatron.convert.model import open_model
    from flexolmo_megatron.convert.progress import byte_progress
    from flexolmo_megatron.exchange.merge import remove, write_merged

    packages = [*args.packages, *args.add]
    if not packages and not args.remove:
        raise FlexOlmoError("nothing to merge: name at least one package, or with --model an expert to --remove")
    if args.remove and args.model is None:
        raise FlexOlmoError(f"--remove {' '.join(args.remove)} needs --model: an anchor has no expert but its own")
    base = open_model(args.model or args.anchor)
    if args.remove:
        base = remove(base, args.remove, args.rows)
    if packages and base.card.row_sets:
        print("note: an expert that joins was not tuned with the others, so the merged model has the untuned router "
              "rows; tune it again", file=sys.stderr)
    report = write_merged(base, packages, args.out, format=args.format, top_k=args.top_k, drop_bias=args.drop_bias,
                          progress=partial(byte_progress, what="merge"))
    _report_positive_bias(report.positive_bias_layers)
    model = report.card.model
    print(f"{args.out}: {model.num_experts} expert{'s' * (model.num_experts > 1)} "
          f"({', '.join(report.card.expert_names)}), top-k {model.top_k}, "
          f"{report.num_bytes / 1e9:,.3f} GB, anchor {report.card.anchor_digest}")


def run_inspect(args: argparse.Namespace) -> None:
    """Run ``flexolmo inspect``."""
    import json
    from functools import partial

    from flexolmo_megatron.commands.console import show
    from flexolmo_megatron.convert.progress import byte_progress
    from flexolmo_megatron.exchange.inspect import describe, render

    if all(path.endswith(".npz") for path in args.path):
        from flexolmo_megatron.domain.similarity import describe_vectors, plot_vectors
        from flexolmo_megatron.domain.similarity import render_vectors as render

        description = describe_vectors(args.path)
        if args.plot:
            plot_vectors(args.path, args.plot)
    elif len(args.path) > 1 or args.plot:
        raise FlexOlmoError(f"{' '.join(args.path)}: expected one checkpoint or package, or else domain vectors (.npz) "
                            "alone, which --plot can draw")
    else:
        description = describe(args.path[0], digest=args.digest, progress=partial(byte_progress, what="digest"))
    if args.json:
        print(json.dumps(description, indent=2))
    else:
        show(render(description))


def _report_positive_bias(layers_by_expert: dict[str, list[int]]) -> None:
    import sys

    for name, layers in layers_by_expert.items():
        if layers:
            print(f"note: the router bias of expert {name} is above 0 in layers {', '.join(map(str, layers))}; "
                  "it is used as min(bias, 0), so there it has no effect", file=sys.stderr)
