"""Hooks of mkdocs: pages that lie elsewhere in the repository, and the list of flags, made from the settings."""

import dataclasses
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from kvds.config.run_config import SECTIONS

ROOT = Path(__file__).parents[1]
ELSEWHERE = (
    "launch/*.md",
    "ds_configs/*.md",
    "examples/**/*.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All pages: those of docs/, those beside what they speak of, and the flags."""
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    files.append(File.generated(config, "flags.md", content=flags_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page's text: on the site docs/ is the root, beside which nothing stands."""
    return markdown.replace("](../", "](") if "/" not in page.file.src_uri else markdown


def flags_page() -> str:
    """All settings as tables: flag, default, choices and meaning, a section each."""
    lines = [
        "# Flags\n",
        "Each is a flag of `kvds distill` and a key of a recipe; `kvds distill --help all` prints the same.\n",
    ]
    for section in SECTIONS:
        lines += [
            f"## {(section.__doc__ or '').splitlines()[0].rstrip('.')}\n",
            "| flag | default | meaning |",
            "| --- | --- | --- |",
        ]
        for item in dataclasses.fields(section):
            default = "" if item.default is dataclasses.MISSING else _plain(item.default)
            choices = item.metadata["choices"]
            meaning = item.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
            cells = [f"`--{item.name}`", f"`{default}`" if default else "", meaning]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _plain(value: object) -> str:
    """A default as a recipe has it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)
