"""The commands that answer a question: data, list, show and check."""

import click

from kdzoo.commands.options import DEBUG, OVERRIDES, loading, show_rich
from kdzoo.errors import UserError
from kdzoo.quantities import counted


@click.command("data")
@click.argument("name", metavar="NAME|folder:PATH")
@DEBUG
@OVERRIDES
def inspect_data(name: str, overrides: tuple[str, ...]) -> None:
    """Decode every image of a data set once, and show what it holds.

    Lists all damaged images, the number of images of each class, and test images that training images repeat. Settings
    of the data may follow as KEY=VALUE: data.val=0.1 measures on a tenth of the training images, data.labels=FILE takes
    the classes from a CSV file with the columns path and label.

    \b
      kdzoo data folder:pictures
      kdzoo data folder:pictures data.labels=labels.csv data.val=0.1
    """
    from kdzoo.engine.progress import Progress

    with Progress() as progress, loading(progress) as rename:
        from kdzoo.resolve import resolve_data
        from kdzoo.results.data_page import inspected, page

        rename(f"reading the files of {name}")
        made = resolve_data(name, overrides)
        found = inspected(made, rename)
    click.echo(page(name, found))
    if found.damaged and made.settings.data.skip_damaged:
        click.echo(f"\nleft out in training: the {len(found.damaged)} damaged images (data.skip_damaged=true)")
    elif found.damaged:
        raise UserError(
            f"damaged images: {len(found.damaged)}; replace or remove them, or train with data.skip_damaged=true"
        )


@click.command("list", short_help="List methods, models, data, protocols, suites or settings.")
@click.argument("kind", type=click.Choice(["distillers", "models", "data", "protocols", "suites", "settings"]))
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "markdown"]),
    default="text",
    help="Form of the list (default: text).",
)
@DEBUG
def list_names(kind: str, style: str) -> None:
    """List the names of methods, models, data sets, protocols or suites, or every setting with its default."""
    from kdzoo.results.catalogue import listing

    click.echo(listing(kind, style))


@click.command()
@click.argument("name")
@click.option(
    "--data",
    default="cifar100",
    help="Data set whose image size and classes the network is made for (default: cifar100).",
)
@DEBUG
def show(name: str, data: str) -> None:
    """Explain a method or a network.

    For a method: its paper, its formula and its keywords. For a network: its size and its feature maps.

    \b
      kdzoo show uhkd
      kdzoo show swin_t --data cifar100
    """
    from kdzoo.results.catalogue import page

    show_rich(page(name, data))


@click.command()
@click.argument("name", metavar="NAME|FILE.py")
@DEBUG
def check(name: str) -> None:
    """Check that a method does what training relies on.

    Each check is a line: shapes, gradients, seeds, precision, compilation, learning, and others. 'kdzoo show kd' names
    a file to begin from.

    \b
      kdzoo check ./mine.py
    """
    from kdzoo.engine.progress import Progress

    with Progress() as progress:
        with loading(progress):
            from kdzoo import registry
            from kdzoo.checks.running import CHECKS, Outcome, results

            kind = registry.load(name)
        found = []
        with progress.doing(f"checking {name}") as rename:
            for result in results(kind):
                found.append(result)
                rename(f"checking {name}, {len(found)} of {len(CHECKS)} checks done")
    failed = 0
    told: dict[str, str] = {}  # the check that met an error first, by that
    for result in found:
        message, got = result.message, result.message.partition("; got ")[2]
        if got and result.outcome is Outcome.FAILED:
            first = told.setdefault(got, result.name)
            message = message if first == result.name else f"the same error as in {first}"
        click.echo(f"{result.outcome:8}  {result.name}" + (f": {message}" if message else ""))
        failed += result.outcome is Outcome.FAILED
    if failed:
        raise UserError(f"{name} fails {counted(failed, 'check')}")
