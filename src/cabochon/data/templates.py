"""Chat templates: Gemma's in jinja, and the rendering of other families' own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from cabochon.core.errors import DataError

__all__ = ["GEMMA_TEMPLATE", "render_template"]

GEMMA_TEMPLATE = """\
{{ bos_token }}
{%- if messages and messages[0]['role'] == 'system' -%}
    {{ raise_exception('the template has no system role; begin the first user turn with it') }}
{%- endif -%}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {%- if role != ('user' if loop.index0 % 2 == 0 else 'model') -%}
        {{ raise_exception('roles must alternate: user, model, user, model, ...') }}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' }}
    {%- if role == 'model' -%}
        {%- generation -%}
            {{ message['content'] + '<end_of_turn>' }}
        {%- endgeneration -%}
        {{ '\\n' }}
    {%- else -%}
        {{ message['content'] + '<end_of_turn>\\n' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
"""Gemma's turns, for transformers: the content is not trimmed, and model turns are marked as what
the model generates (their <end_of_turn> too)."""


def render_template(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    names: Mapping[str, str],
    open_turn: bool,
) -> str:
    """The conversation as the template writes it, run in a sandbox.

    Args:
        template: jinja source, as in a folder's chat_template.jinja.
        messages: mappings with "role" and "content".
        names: further variables, such as bos_token.
        open_turn: end with the beginning of a model turn.

    Raises:
        DataError: the template refuses the conversation or is not valid jinja.
    """
    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=open_turn,
            **names,
        )
    except (jinja2.TemplateError, *_FAILURES_WITHIN) as error:
        raise DataError(f"the chat template refuses this conversation: {error}") from error


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


_FAILURES_WITHIN = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What a template's own expressions may raise."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``, which marks what a model wrote; it renders as what it holds."""

    tags = {"generation"}  # noqa: RUF012 (the attribute jinja2 looks for)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes for HTML, which would put \u003c into prompts.
    return json.dumps(value, ensure_ascii=False, indent=indent)
