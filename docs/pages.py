"""Make the pages of the site that come from the code: one for each method and example, and the Python API.

mkdocs calls the functions named ``on_...``. Nothing that they make is committed.
"""

import html
import inspect
import posixpath
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import kdzoo
from kdzoo import Distiller, registry

ROOT = Path(__file__).parents[1]
OTHERS = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")  # pages that lie outside of docs/
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.csv"))
# Few systems have a font for mathematics, and one comes with this package.
MATH_FONT = Path(str(find_spec("ziamath").origin)).with_name("fonts") / "STIXTwoMath-Regular.ttf"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def on_config(config: MkDocsConfig) -> None:
    """Add a page for each method to the navigation."""
    [methods] = [entry["Methods"] for entry in config.nav or [] if "Methods" in entry]
    methods += [{name: f"methods/{name}.md"} for name in registry.names()]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and the files outside of docs/ that pages link to."""
    made = {f"methods/{name}.md": method_page(name) for name in registry.names()}
    made |= {"examples.md": examples_page(), "api/index.md": api_page()}
    made |= {f"api/{name}.md": module_page(name) for name in public(modules=True)}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    for path in (*OTHERS, *(str(file.relative_to(ROOT)) for file in (*RESULTS, *EXAMPLES))):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "math.ttf", abs_src_path=str(MATH_FONT)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    if here == "methods.md":
        markdown = re.sub(r"^\| (\w+) \| (\w+) \| (\S+) \|", linked_row, markdown, flags=re.MULTILINE)
    folder = posixpath.dirname(here if here in OTHERS else f"docs/{here}")

    def moved(match: re.Match[str]) -> str:
        target, mark, anchor = match[1].partition("#")
        if not target or "://" in target:
            return match[0]
        there = posixpath.normpath(posixpath.join(folder, target)).removeprefix("docs/")
        return f"]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{mark}{anchor})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, markdown)


def linked_row(row: re.Match[str]) -> str:
    """Link the first cells of a row in the table of methods: the method's page, and its paper."""
    name, fidelity, paper = row.groups()
    is_method = name in registry.names()
    return f"| [{name}](methods/{name}.md) | {fidelity} | {paper_link(paper, short=True)} |" if is_method else row[0]


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> None:
    """Check that a page makes the browser ask no other server for anything.

    Raises:
        PluginError: it does.
    """
    if found := re.search(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//""", output):
        raise PluginError(f"{page.file.src_uri} asks another server: {found[0]}")


def public(modules: bool) -> list[str]:
    """List the public names of kdzoo that are modules, or those that are not."""
    return [name for name in sorted(kdzoo.__all__) if inspect.ismodule(getattr(kdzoo, name)) is modules]


def api_page() -> str:
    """Write the page of all public functions and classes."""
    functions = [name for name in public(modules=False) if inspect.isfunction(getattr(kdzoo, name))]
    classes = [name for name in public(modules=False) if name not in functions]
    parts = ["# Python API\n\nEverything here is `kdzoo.NAME`, and each example runs as a test.\n"]
    for title, names in (("Functions", functions), ("Classes", classes)):
        parts += [f"## {title}\n", *(f"::: kdzoo.{name}\n    options:\n      heading_level: 3\n" for name in names)]
    return "\n".join(parts)


def module_page(name: str) -> str:
    """Write the page of a public module."""
    return f"::: kdzoo.{name}\n    options:\n      heading_level: 1\n"


def examples_page() -> str:
    """Write the page of the scripts in examples/."""
    parts = ["# Examples\n\nEach script runs as a test. They are in the folder `examples` of a checkout.\n"]
    for file in EXAMPLES:
        text = file.read_text(encoding="utf-8")
        title = file.stem.replace("_", " ").capitalize()
        parts.append(f"## {title}\n\n[{file.name}](examples/{file.name})\n\n```python\n{text}```\n")
    return "\n".join(parts)


def method_page(name: str) -> str:
    """Write the page of one method, from its file and from the committed results."""
    method, distiller = registry.find(name), registry.load(name)()
    title, _, text = (inspect.getdoc(type(distiller)) or "").partition("\n")
    text, _, source = text.partition("\nSource: ")
    text, _, arguments = text.partition("\nArgs:\n")
    source, _, after = source.partition("\n\n")
    fidelity = str(distiller.fidelity)
    pair = "--teacher resnet32x4 " if distiller.needs.teacher else ""
    parts = [
        f"# {name}",
        f"*{escape(title.strip())}*",
        escape(method.summary),
        f"| paper | {paper_link(distiller.paper)} |\n|---|---|\n"
        f"| fidelity | **{fidelity}**: {registry.FIDELITIES[fidelity]} |\n"
        f"| source | {escape(' '.join(source.split())) or '-'} |\n"
        f"| needs | {'; '.join(needs(distiller))} |",
        "## Loss",
        *prose(text),
        *prose(after),
        "## Try it",
        f"```sh\nkdzoo run --distiller {name} {pair}--student resnet8x4\n```",
        "## Keywords",
        "Each is set as `distiller.KEYWORD=VALUE`.",
        keyword_table(distiller, arguments),
        "## Results",
        *results(name),
    ]
    if f"`{name}`" in (ROOT / "docs" / "frequency.md").read_text(encoding="utf-8"):
        parts.append("[Distilling by frequency](../frequency.md) says what it hands over and names its control.")
    return "\n\n".join(parts) + "\n"


def paper_link(paper: str, short: bool = False) -> str:
    """Link a paper as a method names it; ``short`` shows what it is in place of a long name."""
    kind, _, rest = paper.partition(":")
    address = {"arXiv": f"https://arxiv.org/abs/{rest}", "doi": f"https://doi.org/{rest}"}.get(kind)
    if kind == "github" or paper.startswith("github.com/"):
        address = f"https://github.com/{paper.removeprefix('github.com/').removeprefix('github:')}"
    elif kind == "https":
        address = paper
    shown = address.split("/")[2] if address and short and kind != "arXiv" else paper
    return f"[{escape(shown)}]({address})" if address else escape(paper)


def needs(distiller: Distiller) -> Iterator[str]:
    """Say in words what a method reads and does beyond the logits."""
    wanted = distiller.needs
    yield "a teacher" if wanted.teacher else "no teacher"
    yield "feature maps of the networks" if wanted.features else "logits and embeddings alone"
    if wanted.labels:
        yield "the labels of the training set"
    if wanted.views:
        yield f"further views of each image ({', '.join(wanted.views)})"
    if wanted.teacher_grad:
        yield "gradients through the frozen teacher"
    if wanted.preactivations:
        yield f"maps before their last ReLU ({', '.join(wanted.preactivations)})"
    if wanted.final:
        yield "final maps whose mean is classified"
    if wanted.stages:
        yield f"stages that run one by one ({', '.join(wanted.stages)})"
    if type(distiller).prepare is not Distiller.prepare:
        yield "a phase before training"
    if type(distiller).deploy is not Distiller.deploy:
        yield "what ships is more than the student"
    if distiller.fewest_classes > 2:
        yield f"at least {distiller.fewest_classes} classes"


def keyword_table(distiller: Distiller, arguments: str) -> str:
    """Tabulate the keywords of a method's constructor with their meaning in its docstring."""
    meanings = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE))
    rows = ["| keyword | default | meaning |", "|---|---|---|"]
    for parameter in inspect.signature(type(distiller)).parameters.values():
        meaning = " ".join(meanings[parameter.name].split())
        rows.append(f"| `{parameter.name}` | `{parameter.default!r}` | {escape(meaning)} |")
    return "\n".join(rows)


def results(name: str) -> Iterator[str]:
    """Write the rows of a method in the committed tables, one table for each pair."""
    found = False
    for file in RESULTS:
        table = pd.read_csv(file)
        if "method" not in table or "fidelity" not in table:
            continue
        own = table[(table["method"] == name) | table["method"].str.startswith(f"{name} (")]
        link = f"([all rows](../benchmarks/results/{file.name}))"
        if "top1_mean" not in own:
            for _, row in own.iterrows():
                found = True
                yield f"**{row['epochs']} epochs on digits, one seed** {link}: {row['top1']:.2f} %; it runs."
            continue
        for (data, protocol, teacher, student), rows in own.groupby(
            ["data", "protocol", "teacher", "student"], sort=False
        ):
            found = True
            yield f"**{escape(f'{teacher} → {student} on {data}')}**, protocol {escape(protocol)} {link}:"
            yield compared(rows, name)
    if not found:
        yield "No committed table has a row of it."


def compared(rows: pd.DataFrame, name: str) -> str:
    """Tabulate rows of one pair for people."""
    lines = ["| keywords | seeds | top-1 last | minus kd | verdict |", "|---" * 5 + "|"]
    for row in rows.to_dict("records"):
        keywords = row["method"].removeprefix(name).strip(" ()") or "defaults"
        spread = "" if pd.isna(row["top1_std"]) else f" ± {row['top1_std']:.2f}"
        interval = "" if pd.isna(row["difference"]) else f"{row['difference']:+.2f}"
        if pd.notna(row["difference_low"]):
            interval += f" ({row['difference_low']:+.2f} to {row['difference_high']:+.2f})"
        verdict = "" if pd.isna(row["verdict"]) else row["verdict"]
        cells = [escape(keywords), str(row["seeds"]), f"{row['top1_mean']:.2f}{spread}", interval, verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def prose(text: str) -> Iterator[str]:
    """Write the paragraphs of a docstring as Markdown, with its formulas as MathML."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith(".. math::"):
            yield formula(paragraph.removeprefix(".. math::"))
        elif paragraph.strip():
            yield re.sub(r"\bdocs/(\w+\.md)", r"[docs/\1](../\1)", escape(paragraph))


def escape(text: str) -> str:
    """Write plain text as Markdown; what stands between two pairs of backticks is code."""
    parts = text.split("``")
    plain = [re.sub(r"([\\`*_\[\]|#])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2]]
    code = [f"`{part}`" for part in parts[1::2]]
    return "".join(part for both in zip(plain, [*code, ""], strict=True) for part in both)


# Names of several letters, which are no products.
NAMES = re.compile(r"(?<=[wL]_{)[A-Za-z]+(?=})|(?<=\^{)(?:weak|strong)(?=})|\bKL(?![A-Za-z])")


def formula(latex: str) -> str:
    """Write a formula as MathML whose lines break between its terms.

    Raises:
        PluginError: it holds a command that the converter does not know.
    """
    lines = []
    for line in split(" ".join(latex.split())):
        terms = []
        for term in line:
            spaced = re.sub(r"\\(log|cos|min|max) +(?!\()", r"\\\1\\,", NAMES.sub(r"\\mathrm{\g<0>}", term))
            made = convert(spaced).replace("<math ", '<math displaystyle="true" ', 1)
            if "\\" in re.sub(r"<[^>]*>", "", made):
                raise PluginError(f"a formula cannot be converted: {term}")
            terms.append(re.sub(r"<mo>(?=&#x0002B;|&#x02212;)", '<mo form="infix">', made, count=1))
        lines.append(f"<span>{' '.join(terms)}</span>")
    return f'<div class="formula">{"".join(lines)}</div>'


BARS = ("|", "\\|")
CLOSED_BY = {"{": "}", "(": ")", "[": "]", "\\{": "\\}", "\\left": "\\right", "\\begin": "\\end"}


def split(latex: str) -> list[list[str]]:
    """Split a formula at each ``\\quad`` into equations, and these into terms that begin with their sign."""
    lines: list[list[str]] = [[""]]
    opened: list[str] = []  # what closes each bracket that is open
    before = ""
    for token in re.findall(r"\\[Bb]ig *(?:\\.|.)|\\[A-Za-z]+|\\.|\s+|.", latex):  # between big brackets it may break
        outside = not opened
        if token in opened:
            while opened.pop() != token:  # a bar that was no bracket, as in KL(p | q)
                pass
        elif token in CLOSED_BY or token in BARS:
            opened.append(CLOSED_BY.get(token, token))
        if outside and token == "\\quad":
            lines[-1][-1] = lines[-1][-1].rstrip(" ,")
            lines.append([""])
        elif outside and token in ("+", "-") and before[-1:] not in ("=", "(", ""):
            lines[-1].append(token)
        else:
            lines[-1][-1] += token
        before = token.strip() or before
    return [[term.strip() for term in line if term.strip()] for line in lines]
