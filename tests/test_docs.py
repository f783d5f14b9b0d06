"""The reference is the code's: no key without its meaning, no command without an example, no page that is out of date."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import typer
import typer.core

from fedgrove import plugins
from fedgrove.cli import app
from fedgrove.job.tables import Job
from fedgrove.job.units import Table
from fedgrove.rounds.disclosure import Disclosure
from fedgrove.rounds.request import Request, request_types

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """docs/site.py."""
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "docs" / "site.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tables() -> list[type[Table]]:
    """Every table that a job file can have, found by walking the job's own types."""
    found: list[type[Table]] = []

    def walk(annotation: object) -> None:
        for part in getattr(annotation, "__args__", ()):
            walk(part)
        if isinstance(annotation, type) and issubclass(annotation, Table) and annotation not in found:
            found.append(annotation)
            for field in annotation.model_fields.values():
                walk(field.annotation)

    walk(Job)
    return found


def test_every_key_of_a_job_is_in_the_reference_with_type_default_and_meaning(site: ModuleType) -> None:
    page = (ROOT / "docs" / "reference" / "job.md").read_text(encoding="utf-8")
    sections = {text.split("\n", 1)[0]: text for text in page.split("\n## ")[1:]}
    assert len(tables()) >= 11
    for table in tables():
        rows = dict(re.findall(r"(?m)^\| `(\w+)` \| (.*) \|$", sections[site.title(table)]))
        assert rows.keys() == table.model_fields.keys() | table.SHORT_FORMS.keys(), table.__name__
        for key, field in table.model_fields.items():
            kind, default, meaning = (cell.strip() for cell in re.split(r"(?<!\\)\|", rows[key]))
            assert kind
            assert len(meaning) > 5, f"{table.__name__}.{key} has no meaning"
            assert (default == "required") == field.is_required()
            if isinstance(field.default, int | float | str) and not field.is_required():
                wanted = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
                assert wanted in default, f"{table.__name__}.{key}"


def test_no_docstring_tells_of_a_key_that_is_not_there(site: ModuleType) -> None:
    for table in tables():
        documented, keys = set(site.meanings(table)), set(table.model_fields) | table.SHORT_FORMS.keys()
        assert documented <= keys, f"{table.__name__}: {documented - keys}"


def test_a_short_form_takes_the_names_that_the_reference_lists() -> None:
    for table, (key, packages) in [(one, item) for one in tables() for item in one.SHORT_FORMS.items()]:
        (kind,) = table.model_fields["kind"].annotation.__args__
        for name in [name for package in packages for name in plugins.names(package)]:
            table.model_validate({"kind": kind, key: name})
        with pytest.raises(ValueError, match=f"{key}: choose one of"):
            table.model_validate({"kind": kind, key: "nothing"})


def test_the_reference_names_the_methods_that_a_key_takes(site: ModuleType) -> None:
    found = packages_of_methods(site)
    assert {"stages.prune.pruners", "stages.structured.expert_scores", "stages.tune.parametrizations"} <= found
    page = (ROOT / "docs" / "reference" / "job.md").read_text(encoding="utf-8")
    for package in found:
        assert f"| {site.one_of(package)} |" in page, package


def test_the_reference_pages_are_those_that_the_code_makes(site: ModuleType) -> None:
    for name, make in site.PAGES.items():
        assert (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8") == make(), f"run: make docs ({name})"


def test_the_table_of_what_leaves_a_client_is_that_of_the_request_types(site: ModuleType) -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert page == site.with_disclosures(page, request_types()), "run: make docs (security.md)"
    for one in request_types():
        assert f"| `{one.KIND}` |" in page
        assert all(disclosure.sentence in page for disclosure in one.DISCLOSES)


def test_the_table_says_of_a_new_request_what_it_asks_and_discloses(site: ModuleType) -> None:
    class Toy(Request):
        """Count the ``words`` of your text.

        More that is not said in the table.
        """

        KIND: ClassVar[str] = "toy/count"
        DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.LOSS, Disclosure.MASKS})

    class Quiet(Request):
        """Do nothing."""

        KIND: ClassVar[str] = "toy/nothing"

    begin, end = site.MARKS
    page = site.with_disclosures(f"before {begin} old {end} after", [Quiet, Toy])
    assert "old" not in page
    assert page.startswith(f"before {begin}\n\n| request")
    assert page.endswith(f"{end} after")
    masks, loss = Disclosure.MASKS.sentence, Disclosure.LOSS.sentence
    assert f"| `toy/count` | Count the `words` of your text. | {masks}; {loss} |\n" in page
    assert "| `toy/nothing` | Do nothing. | nothing of its text |" in page
    with pytest.raises(ValueError, match="marks"):
        site.with_disclosures(f"only {begin}", [])


def test_every_command_has_an_example(site: ModuleType) -> None:
    for path, command in site.walk("fedgrove", typer.main.get_command(app)):
        assert f"Example: {path}" in " ".join((command.help or "").split()), path


def test_every_command_in_the_docs_exists_with_its_options() -> None:
    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "src" / "fedgrove" / "deploy" / "flare" / "texts").iterdir(),
    ]
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        code = "".join(re.findall(r"(?ms)^ *```\w*\n(.*?)^ *```", text)) if page.suffix == ".md" else text
        lines = re.findall(r"(?m)(?:^ *|; do |/bin/|&& exec )(fedgrove [a-z].*?)(?:; done|\"\])?$", code)
        found += [(page, line) for line in [*lines, *re.findall(r"`(fedgrove [a-z][^`]*)`", text)]]
    assert len(found) > 80
    whole = typer.main.get_command(app)
    for page, line in found:
        words = shlex.split(line.replace("submit|watch|fetch", "watch"), comments=True)[1:]
        command = whole
        while words and isinstance(command, typer.core.TyperGroup):
            assert words[0] in command.commands, f"{page.name}: {line}"
            command = command.commands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options, f"{page.name}: {line}"


def test_every_benchmark_in_the_docs_exists_with_its_options() -> None:
    wrong = []
    for page in (*ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.py")):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, options in re.findall(r"bench/(\w+\.py)((?:[^\n`]|\n +--)*)", text):
            script = ROOT / "bench" / name
            known = script.read_text(encoding="utf-8") if script.is_file() else ""
            used = re.findall(r"(?<!\S)--[a-z-]+", options)
            wrong += [f"{page.name}: {name} {option}" for option in used or [""] if f'"{option}' not in known]
    assert wrong == []


def test_the_jobs_in_the_docs_hold_only_keys_that_exist() -> None:
    known = set().union(*(set(table.model_fields) | table.SHORT_FORMS.keys() for table in tables()))

    def check(page: Path, value: object) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                assert key in known, f"{page.name}: {key}"
                if key != "shares":  # whose keys are names of tensors
                    check(page, part)
        elif isinstance(value, list):
            for part in value:
                check(page, part)

    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    blocks = [
        (page, text) for page in pages for text in re.findall(r"(?ms)^```toml\n(.*?)^```", page.read_text(encoding="utf-8"))
    ]
    assert len(blocks) > 5
    for page, text in blocks:
        if page.name != "federation.md":  # it shows other files too
            check(page, tomllib.loads(text))


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in nav, f"mkdocs.yml: {page.name} is missing"


def packages_of_methods(site: ModuleType) -> set[str]:
    """The packages of all methods that a job may name, from the types of the job's keys."""
    metadata = [one for table in tables() for field in table.model_fields.values() for one in field.metadata]
    return {made_by["package"] for made_by in map(site.arguments_of, metadata) if "package" in made_by}


def test_every_method_is_on_the_methods_page(site: ModuleType) -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    found = [name for package in packages_of_methods(site) for name in plugins.names(package)]
    for name in found:  # two packages may have a method of one name
        assert text.count(f"| `{name}` |") == found.count(name), f"methods.md: {name}"
    export = (ROOT / "docs" / "how-to" / "export.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in export for name in plugins.names("exports"))


def test_links_out_of_the_docs_become_text_on_the_site(site: ModuleType) -> None:
    assert site.on_page_markdown("see [`job.py`](../src/fedgrove/job.py) and [a](b.md)") == "see `job.py` and [a](b.md)"
    assert inspect.signature(site.on_page_markdown).parameters["_"].kind is inspect.Parameter.VAR_KEYWORD
