"""``flexolmo mix``: documents of a recipe's sources, filtered."""

import argparse
import sys

from flexolmo_megatron.commands.documents import add_text_key_option, add_where_options


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "mix", help="filter documents by a recipe, such as those of the paper's sets",
        description="Run a recipe on whichever of its sources you have: writes a new folder with the documents that "
                    "its filters keep (SOURCE-NNNNNN.jsonl, for flexolmo data and proxy), report.json with what each "
                    "filter kept and dropped, and recipe.yaml. Without a recipe, the recipes are listed; without a "
                    "source, the recipe is shown. The same command goes on with a run that was stopped, from "
                    "OUT.state.")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="name of a recipe, or a YAML file")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=FILES",
                        help="files of a source of the recipe (.jsonl, .jsonl.gz, .jsonl.zst, .parquet) or a quoted "
                             "pattern; may be repeated")
    parser.add_argument("--out", metavar="DIR", help="new folder")
    add_where_options(parser)
    add_text_key_option(parser)
    parser.add_argument("--max-bad", type=int, default=100, metavar="N",
                        help="how many empty or broken documents of a file are skipped before the run stops "
                             "(default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run ``flexolmo mix``."""
    from flexolmo_megatron.errors import FlexOlmoError
    from flexolmo_megatron.shards import require_datatrove

    require_datatrove("flexolmo mix")
    from flexolmo_megatron.mix.recipe import load_recipe, recipe_names
    from flexolmo_megatron.mix.run import mix
    from flexolmo_megatron.shards.run import Where

    if args.recipe is None and (args.source or args.out):
        raise FlexOlmoError("RECIPE is missing: expected the name of a recipe, or a YAML file")
    if args.out and not args.source:
        raise FlexOlmoError("--source is missing: expected NAME=FILES of a source of the recipe")
    if args.recipe is None:
        for name in recipe_names():
            print(f"{name:18} {' '.join(load_recipe(name).about.split())}")
        return
    recipe = load_recipe(args.recipe)
    if not args.source:
        print(recipe.text, end="")
        return
    if not args.out:
        raise FlexOlmoError("--out is missing: expected a new folder")
    sources: dict[str, list[str]] = {}
    for given in args.source:
        name, separator, pattern = given.partition("=")
        if not separator or not pattern:
            raise FlexOlmoError(f"--source {given}: expected NAME=FILES, as in {next(iter(recipe.sources))}='*.jsonl'")
        sources.setdefault(name, []).append(pattern)
    report = mix(recipe, sources, args.out, where=Where.of(args.workers, args.slurm), text_key=args.text_key,
                 max_bad=args.max_bad)
    for name, source in report["sources"].items():
        unusable = sum(source["unusable"].values())
        print(f"{name}: {source['documents']:,} documents" + f", and {unusable:,} unusable" * bool(unusable))
        for row in source["filters"]:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in row["reasons"].items())
            print(f"  {row['name']:18} kept {row['kept']:>12,}   dropped {row['dropped']:>12,}"
                  + f"   ({reasons})" * bool(reasons))
        print(f"  written {source['written']:,} documents, {source['text_bytes'] / 1e6:,.1f} MB; licence: "
              f"{source['licence']}")
        if not source["written"]:
            print(f"warning: of the source {name}, nothing was kept", file=sys.stderr)
    if report["absent"]:
        print(f"sources of the recipe that were not given: {', '.join(report['absent'])}")
