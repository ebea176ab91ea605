"""The commands that draw what runs left: report and plot."""

from pathlib import Path

import click

from kdzoo.commands.options import DEBUG, FILE, PATH, tell

RUNS = click.argument("folders", nargs=-1, required=True, type=PATH, metavar="RUNS...")
BASELINE = click.option(
    "--baseline", metavar="METHOD", help="Method that the others are compared with (default: kd, or none without it)."
)


@click.command()
@RUNS
@click.option(
    "--out",
    type=FILE,
    help="File to write (default: report.html, and no file with --serve).",
)
@BASELINE
@click.option("--serve", is_flag=True, help="Show the report at an address of this machine until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port of that address (default: a free one).")
@DEBUG
def report(folders: tuple[Path, ...], out: Path | None, baseline: str | None, serve: bool, port: int) -> None:
    """Write one HTML page that shows what finished runs found.

    RUNS are folders of runs, or folders that hold some. The page needs no network: open it from disk, print it, or send
    it. With --serve it is made anew each time it is loaded, so that it shows a bench or a search at work.

    \b
      kdzoo report runs/digits
      kdzoo report runs/cifar100-crd --baseline dkd --out dkd.html
    """
    from kdzoo.results.report.page import page, write
    from kdzoo.results.report.serve import HERE, server

    if out is not None or not serve:
        out = out or Path("report.html")
        left_out = write(folders, out, baseline)
        click.echo(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
        tell(left_out)
    if serve:
        if out is None:
            page(folders, baseline)  # what is wrong is said here, before an address is
        with server(lambda: page(folders, baseline), port) as opened:
            click.echo(f"http://{HERE}:{opened.server_port}/  (Ctrl-C ends it)")
            try:
                opened.serve_forever()
            except KeyboardInterrupt:
                click.echo("ended", err=True)


@click.command()
@RUNS
@click.option(
    "--out",
    type=FILE,
    required=True,
    metavar="FILE",
    help="File to write; its ending is the format: png, pdf or svg.",
)
@click.option(
    "--kind",
    type=click.Choice(["forest", "curves", "cost", "ranks"]),
    default="forest",
    help="Differences to the baseline, learning curves, accuracy against cost, or average ranks (default: forest).",
)
@click.option(
    "--cost",
    type=click.Choice(["parameters", "flops", "file_bytes", "latency_1", "latency_64", "seconds"]),
    help="Cost of --kind cost (default: latency_1, that of one image).",
)
@BASELINE
@DEBUG
def plot(folders: tuple[Path, ...], out: Path, kind: str, cost: str | None, baseline: str | None) -> None:
    """Draw finished runs for a paper.

    \b
      kdzoo plot runs/cifar100-crd --out forest.pdf
      kdzoo plot runs/cifar100-crd --kind ranks --out ranks.pdf
    """
    from kdzoo.results.plots import draw

    if cost and kind != "cost":
        raise click.UsageError(f"--cost belongs to --kind cost, and the kind is {kind}; leave one of them out")
    left_out = draw(folders, out, kind, cost or "latency_1", baseline)
    click.echo(f"wrote {out}")
    tell(left_out)
