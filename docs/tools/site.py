"""Hooks of MkDocs (mkdocs.yml): pages that lie elsewhere in the clone, and links to what is no page.

README.md is the first page; CONTRIBUTING.md, SECURITY.md and CHANGELOG.md are pages too. A link to another file of the
clone (a recipe, a module) becomes the path in code style, after a check that the file is there.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
_ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
_PAGE_OF = {source: page for page, source in _ELSEWHERE.items()}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks.site")


def on_config(config: Any) -> Any:
    config.mdx_configs.setdefault("toc", {})["slugify"] = _slug
    return config


def _slug(heading: str, separator: str) -> str:
    """The anchor that GitHub gives a heading, so that links work in both places."""
    return re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", separator)


def on_files(files: Files, config: Any) -> Files:
    for page, source in _ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Makes links in a page relative to the site, whatever file of the clone the page comes from."""
    here = page.file.src_uri
    source = _ELSEWHERE.get(here, f"docs/{here}")
    fenced = re.split(r"(?m)(^```.*?^```$)", markdown, flags=re.DOTALL)
    for number in range(0, len(fenced), 2):
        fenced[number] = _LINK.sub(lambda found: _link(found, source, here), fenced[number])
    return "".join(fenced)


def _link(found: re.Match[str], source: str, here: str) -> str:
    mark, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    if "://" in target or target.startswith("mailto:"):
        return found[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if not (ROOT / path).exists():
        _log.warning("%s links to %s, and there is no %s", source, target, path)
        return found[0]
    if path in _PAGE_OF:
        page = _PAGE_OF[path]
    elif path.startswith("docs/") and (ROOT / path).is_file():
        page = path.removeprefix("docs/")
    else:
        return f"{text} (`{path}`)" if text.strip("`") != path else f"`{path}`"
    relative = posixpath.relpath(page, posixpath.dirname(here) or ".")
    return f"{mark}[{text}]({relative}{anchor})"
