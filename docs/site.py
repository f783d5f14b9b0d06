"""Makes the pages of docs/reference from the code, and takes links to sources out of what becomes the website.

python docs/site.py            writes docs/reference/*.md, and the table of what leaves a client in docs/security.md
mkdocs build --strict          builds the site; calls on_page_markdown below
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
import typer
from pydantic import AfterValidator, BeforeValidator
from pydantic.fields import FieldInfo

from fedgrove import plugins
from fedgrove.cli import app
from fedgrove.job.federated import FederatedJob
from fedgrove.job.tables import Job
from fedgrove.job.units import Table, method_of, quantity
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.rounds.request import Request, request_types

HERE = Path(__file__).parent
UNITS = {"B": "bytes", "bit(?:/s)?": "bits/s"}
MARKS = ("<!-- made by `make docs` from the request types -->", "<!-- end of what is made -->")
SOURCES = re.compile(r"\[([^\]]+)\]\((?:\.\./)+[^)]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A hook of mkdocs: a link out of docs/ leads somewhere in the repository, and nowhere on the site."""
    return SOURCES.sub(r"\1", markdown)


def tables() -> list[type[Table]]:
    """Every table that a job file can have, those of each kind of stage included, in the order in which they are first used."""
    found: list[type[Table]] = []

    def walk(annotation: Any) -> None:
        for part in get_args(annotation):
            walk(part)
        if isinstance(annotation, type) and issubclass(annotation, Table) and annotation not in found:
            found.append(annotation)
            for field in annotation.model_fields.values():
                walk(field.annotation)

    walk(Job)
    return [*found, FederatedJob]


def job_page() -> str:
    """Every key of a job: type, default, meaning."""
    parts = [
        "# Every key of a job\n\n`make docs` makes this page from `src/fedgrove/job/tables.py` and the `config.py` of each "
        "kind of stage. A key that is not listed here is refused by name. Paths are relative to the job file. "
        "`fedgrove init` writes a job with comments; `--set stages.0.sparsity=0.6` changes a key for one run."
    ]
    every = tables()
    for table in every:
        doc = inspect.cleandoc(table.__doc__ or "")
        says = plain(doc.split("\n\nAttributes:")[0])
        says = re.sub(r"^`[^:]*`: (.)", lambda found: found[1].upper(), says)
        meaning = meanings(table)
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        inherited = next((base.model_fields for base in table.__mro__[1:] if base in every), {})
        for key, field in table.model_fields.items():
            if key not in inherited:
                rows.append(f"| `{key}` | {kind(field)} | {default(field)} | {meaning[key]} |")
        rows += [f"| `{key}` | {one_of(*packages)} | – | {meaning[key]} |" for key, packages in table.SHORT_FORMS.items()]
        parts.append(f"## {title(table)}\n\n{says}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def title(table: type[Table]) -> str:
    """The heading of a table: how it is written in the file."""
    found = re.match(r"``+(.+?)``+(?: of ``+(.+?)``+)?", inspect.cleandoc(table.__doc__ or ""))
    if found:
        return f"`{found[1]}`" + (f" with `{found[2]}`" if found[2] else "")
    return table.__name__


def meanings(table: type[Table]) -> dict[str, str]:
    """What the docstring says of each key, and of those that it inherits."""
    found: dict[str, str] = {}
    for cls in [cls for cls in reversed(table.__mro__) if issubclass(cls, Table)]:
        _, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?=    \S)", attributes.rstrip()):
            keys = "|".join(table.model_fields)
            for part in re.split(rf"; (?=(?:{keys}): )", " ".join(entry.split())):
                names, colon, text = part.partition(": ")
                if colon:
                    found |= dict.fromkeys(names.split(", "), plain(text).replace("|", "\\|"))
    return found


def kind(field: FieldInfo) -> str:
    """The type of a key, for people."""
    return with_metadata(field.annotation, field.metadata)


def with_metadata(annotation: Any, metadata: Iterable[Any]) -> str:
    """A type in words, with what its ``Annotated`` metadata says of it: names of methods, a quantity, limits."""
    metadata = tuple(metadata)
    for one in metadata:
        made_by = arguments_of(one)
        if "package" in made_by:
            return one_of(made_by["package"])
        if "unit" in made_by:
            return f"{UNITS[made_by['unit']]}, such as {made_by['example']}"
    return spell(annotation) + limits(metadata)


def arguments_of(validator: Any) -> dict[str, Any]:
    """What ``method_of`` or ``quantity`` of :mod:`fedgrove.job.units` was called with to make a validator; else nothing."""
    if not isinstance(validator, AfterValidator | BeforeValidator):
        return {}
    made_by = validator.func.__qualname__.partition(".")[0]
    if made_by not in (method_of.__name__, quantity.__name__):
        return {}
    return dict(inspect.getclosurevars(validator.func).nonlocals)


def one_of(*packages: str) -> str:
    """The names of all methods in some packages."""
    return "one of " + ", ".join(f'`"{name}"`' for package in packages for name in plugins.names(package))


def spell(annotation: Any) -> str:
    """A Python type in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value!r}`".replace("'", '"') for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(spell(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        return f"list of: {spell(args[0])}"
    if origin is dict:
        return f"table of: {spell(args[1])}"
    if hasattr(annotation, "__metadata__"):
        return with_metadata(args[0], annotation.__metadata__)
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return f"a table, {title(annotation)}"
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "file"}
    return words.get(annotation, str(annotation))


def limits(metadata: Any) -> str:
    """What a number must be: "> 0"; without limits from a million on, which no job comes near."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    inner = [getattr(one, "metadata", [one]) for one in metadata]
    found = [f"{sign} {getattr(one, name):g}" for part in inner for one in part for name, sign in signs.items()
             if getattr(one, name, None) is not None and abs(getattr(one, name)) < 10**6]  # fmt: skip
    return " " + ", ".join(found) if found else ""


def default(field: FieldInfo) -> str:
    """What holds where a key is left out."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "–"
    if isinstance(value, Table):
        return "its defaults"
    if isinstance(value, tuple):
        return f"`{list(value)}`".replace("'", '"')
    return f"`{str(value).lower() if isinstance(value, bool) else repr(value)}`".replace("'", '"')


def commands_page() -> str:
    """Every command: what it does, its arguments and options."""
    parts = ["# Every command\n\nMade from the commands' own help by `make docs`; `fedgrove COMMAND --help` shows the same."]
    root = typer.main.get_command(app)
    for path, command in walk("fedgrove", root):
        says = inspect.cleandoc(command.help or "")
        context = click.Context(command, info_name=path)
        rows = ["| | |", "|---|---|"]
        for parameter in command.params:
            if parameter.name != "help":
                record = parameter.get_help_record(context) or (parameter.make_metavar(context), getattr(parameter, "help", ""))
                about = re.sub(r"\s*\[([^\]]*(?:default|required|>=)[^\]]*)\]", r" (\1)", record[1] or "").strip()
                usage = record[0].replace("|", "\\|")
                rows.append(f"| `{usage}` | {about} |")
        example = re.search(r"(?s)Example: (.+)$", says)
        if example:
            says = says[: example.start()].rstrip() + f"\n\n```sh\n{' '.join(example[1].split())}\n```"
        parts.append(f"## {path}\n\n{says}\n\n" + ("\n".join(rows) if len(rows) > 2 else ""))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def walk(path: str, command: Any) -> list[tuple[str, Any]]:
    """A command and those below it, leaves only."""
    if not hasattr(command, "commands"):
        return [(path, command)]
    return [leaf for name, part in command.commands.items() for leaf in walk(f"{path} {name}", part)]


def disclosures(types: Iterable[type[Request]]) -> str:
    """A table: what a client may be asked, and what its response discloses at most."""
    rows = ["| request | what the client is asked | what its response discloses, at most |", "|---|---|---|"]
    for one in sorted(types, key=lambda one: one.KIND):
        asked = plain(" ".join(inspect.cleandoc(one.__doc__ or "").split("\n\n")[0].split()))
        told = [disclosure.sentence for disclosure in Disclosure if disclosure in one.DISCLOSES]
        rows.append(f"| `{one.KIND}` | {asked} | {'; '.join(told) or 'nothing of its text'} |")
    return "\n".join(rows)


def with_disclosures(page: str, types: Iterable[type[Request]]) -> str:
    """A page whose table between the two ``MARKS`` is made anew."""
    before, begin, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (begin and end):
        raise ValueError(f"the page has not both marks: {MARKS}")
    return f"{before}{begin}\n\n{disclosures(types)}\n\n{end}{after}"


def plain(text: str) -> str:
    """Docstring to Markdown: roles and double backticks become code."""
    return re.sub(r"``(.+?)``", r"`\1`", re.sub(r":\w+:`~?(.+?)`", r"`\1`", text))


PAGES = {"job.md": job_page, "commands.md": commands_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (HERE / "reference" / name).write_text(make(), encoding="utf-8")
    security = HERE / "security.md"
    security.write_text(with_disclosures(security.read_text(encoding="utf-8"), request_types()), encoding="utf-8")
