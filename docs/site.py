"""Hooks of mkdocs: pages from files that are no Markdown in docs/, and links that lead out of docs/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Pages made of other files, by their name in the site.
MADE = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "tutorial.md": "docs/tutorial.ipynb"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    for name, source in MADE.items():
        text = (ROOT / source).read_text("utf-8")
        files.append(File.generated(config, name, content=notebook(text) if source.endswith(".ipynb") else text))
    return files


def notebook(text: str) -> str:
    """A notebook's cells as Markdown."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(body if kind == "markdown" else f"```python\n{body}\n```" for kind, body in cells)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as files of the repository have them become links of the site; see `linked`."""
    source = ROOT / MADE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = FENCE.split(markdown)  # every second part is a code block
    parts[::2] = [LINK.sub(lambda link: linked(link, source, config, files), part) for part in parts[::2]]
    return "".join(parts)


def linked(link: re.Match[str], source: Path, config: Any, files: Files) -> str:
    """The link from the file `source`, as the site needs it.

    A page is linked as a page, another file is copied into the site. A folder keeps its words alone. What is not there
    stays as it is, and mkdocs refuses it.
    """
    picture, words, target, anchor = link.groups()
    path = (source.parent / target).resolve()
    if "://" in target or not path.exists():
        return link[0]
    name = path.relative_to(ROOT).as_posix()
    pages = {made: page for page, made in MADE.items()}
    if name in pages:
        name = pages[name]
    elif path.is_relative_to(ROOT / "docs"):
        name = path.relative_to(ROOT / "docs").as_posix()
    elif path.is_dir() or path.suffix == ".md":
        return f"{words} (`{name}`)"
    else:
        name = f"repository/{name}"
        if name not in files.src_uris:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return f"{picture}[{words}]({name}{anchor or ''})"
