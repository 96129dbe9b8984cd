"""What is written for readers: links lead somewhere, the pages can be built, the README stays short."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MADE_FOR_THE_SITE = {REPOSITORY / "docs/flags.md"}  # by docs/site_hooks.py
TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
PAGES = [REPOSITORY / name for name in TRACKED] or [p for p in REPOSITORY.glob("[a-z]*/**/*.md")]


def anchors(page: Path) -> set[str]:
    """A page's headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings_that_are_there(page):
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if target in MADE_FOR_THE_SITE:
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


def test_readme_is_for_a_newcomer():
    assert len((REPOSITORY / "README.md").read_text().split()) <= 1500


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install kvds[docs]"
)
def test_the_pages_can_be_built_and_have_all_flags_and_the_python_reference(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    flags, reference = (tmp_path / "flags.html").read_text(), (tmp_path / "api.html").read_text()
    assert "--kv_weight" in flags and "--teacher_name" in flags
    assert 'id="kvds.ops.map_projection_loss"' in reference
    assert (tmp_path / "benchmarks/results/EVIDENCE.html").exists()
