"""Templates to source text: the only module that imports jinja2."""

from __future__ import annotations

import re
import textwrap
from functools import cache
from typing import Any

import jinja2

from tilewright import __version__
from tilewright.codegen.backends.registry import find_backend
from tilewright.codegen.hardware.archs import Arch
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.ops.template import Template
from tilewright.codegen.recipe.model import ABI_VERSION
from tilewright.codegen.space import TEMPLATE, Config


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("tilewright.templates", ""),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def template_file(name: str, language: str) -> str:
    """Where the template ``op/language_algorithm`` lies under templates/: ``op/language/algorithm``, with a suffix."""
    op, _, rest = name.partition("/")
    folder, _, algorithm = rest.partition("_")
    return f"{op}/{folder}/{algorithm}{find_backend(language).template_suffix}"


def render(template: Template[Any], signature: Signature, config: Config, arch: Arch) -> str:
    """Source text of one variant, headed by what made it. The same variant always gives the same text."""
    return header(template, signature, config, arch) + render_code(template, signature, config, arch)


def header(template: Template[Any], signature: Signature, config: Config, arch: Arch) -> str:
    """Comment lines that say what made a source text: this version, the template, the signature and the knobs."""
    file = template_file(template.name, template.language)
    made_by = f"Made by tilewright {__version__} from templates/{file} for {arch.name}."
    knobs = " ".join(f"{name}={value}" for name, value in config.items() if name != TEMPLATE)
    comment = find_backend(template.language).comment
    return "".join(
        f"{comment} {line}\n"
        for text in (made_by, signature.describe(), knobs)
        for line in textwrap.wrap(text, 117, break_long_words=False, break_on_hyphens=False)
    )


def render_code(template: Template[Any], signature: Signature, config: Config, arch: Arch) -> str:
    """Source text of one variant without the header: equal for two versions, or two configs, that make one kernel."""
    body = (
        _environment()
        .get_template(template_file(template.name, template.language))
        .render(
            signature=signature,
            config=dict(config),
            arch=arch,
            abi_version=ABI_VERSION,
            **template.context(signature, config, arch),
        )
    )
    return find_backend(template.language).formatted(re.sub(r"\n{3,}", "\n\n", body.lstrip("\n")))
