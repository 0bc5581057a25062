"""The HTML file: templates, packed figures, and a policy that lets in nothing else."""

from __future__ import annotations

import base64
import hashlib
import zlib
from functools import cache
from importlib import resources
from typing import Any

import jinja2
import msgspec

SCRIPTS = (
    "data.js", "dom.js", "pool.js", "history.js", "requests.js", "timeline.js", "prefix.js",
    "kernels.js", "checks.js", "events.js", "main.js",
)  # fmt: skip
"""In the order in which they use each other; together they are one script."""

STYLES = ("report.css",)


def render(document: dict[str, Any], pages: list[bytes]) -> bytes:
    """The whole file."""
    script, style = _script(), _style()
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            document=document,
            title=document["label"] or "trace",
            policy=policy(script, style),
            script=script,
            style=style,
            data=packed(msgspec.json.encode(document)),
            pages=[packed(page) for page in pages],
        )
    )
    return html.encode()


def policy(script: str, style: str) -> str:
    """Only this script and this style; no network, no frames, no HTML made from text."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def packed(data: bytes) -> str:
    """Deflated, in an alphabet that means nothing to an HTML parser."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("vllm_trace.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


@cache
def _script() -> str:
    parts = [_static(name) for name in SCRIPTS]
    return '\n"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"


@cache
def _style() -> str:
    return "\n" + "\n".join(_static(name) for name in STYLES)


def _static(name: str) -> str:
    text = resources.files("vllm_trace.report").joinpath("static", name).read_text("utf-8")
    if "</" in text and name.endswith(".js"):
        raise ValueError(f"{name} holds '</', which would end the script")
    return text
