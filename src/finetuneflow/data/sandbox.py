"""A sandbox with a meter for chat templates, which are programs written by strangers.

Place in the flow: `templates.resolve_template` compiles every template here, our own included.
Jinja's immutable sandbox keeps a template away from Python's internals; it does not bound what a
template *costs*. So everything that can make something large is metered: loops, calls, filters,
concatenations, literals and operators charge a budget, and every value they make is measured.

Protects against: endless loops, memory bombs, attribute escapes. Not against bugs in Jinja itself.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime
from functools import wraps
from threading import local
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError, UndefinedError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from finetuneflow.errors import DataError

MAX_SOURCE_CHARS = 262_144  # real templates: 0.3 to 30 thousand characters
MAX_OPERATIONS = 2_000_000  # one render; a 1,000-turn conversation needs about 50,000
MAX_CHARS = 16_000_000  # one value or one output
MAX_NODES = 100_000  # members of one list or dict the template builds, counted through all levels
MAX_WIDTH = 10_000  # a number that a string method or filter may be given (padding, indent, …)
MAX_SECONDS = 10.0  # one render

# A template that writes today's date would give other tokens tomorrow and break caches and resumes.
FIXED_DATE = date(2026, 1, 1)

_COSTLY_FILTERS = ("wordwrap", "urlize", "xmlattr", "pprint", "random", "filesizeformat", "striptags")
_COSTLY_METHODS = frozenset({"expandtabs", "translate", "maketrans", "format_map", "encode"})


class TemplateRefusal(DataError):
    """The template itself said no to a conversation (`raise_exception`), or met a value it cannot render."""


class _Meter(local):
    """What the running render has used. One per environment and thread."""

    def __init__(self) -> None:
        self.operations = 0
        self.chars = 0
        self.deadline = float("inf")

    def start(self) -> None:
        self.operations = 0
        self.chars = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def charge(self, amount: int = 1) -> None:
        self.operations += amount
        if self.operations > MAX_OPERATIONS:
            raise _over(f"it needs more than {MAX_OPERATIONS:,} operations for one conversation")
        if self.operations & 1023 < amount and time.monotonic() > self.deadline:
            raise _over(f"one conversation takes longer than {MAX_SECONDS:.0f} seconds")

    def value(self, value: Any) -> Any:
        """Charge for a value and measure it; gives the value back."""
        self.charge()
        if isinstance(value, str):
            if len(value) > MAX_CHARS:
                raise _over(f"it builds a text of more than {MAX_CHARS:,} characters")
        elif isinstance(value, (list, tuple, dict)) and value:
            self.charge(_count_nodes(value))
        return value

    def output(self, value: Any) -> Any:
        """Measure what `{{ … }}` is about to write."""
        self.value(value)
        if isinstance(value, str):
            self.chars += len(value)
            if self.chars > MAX_CHARS:
                raise _over(f"it writes more than {MAX_CHARS:,} characters for one conversation")
        return value


def _over(what: str) -> DataError:
    return DataError(
        "TEMPLATE_TOO_COSTLY",
        f"The chat template was stopped: {what}.",
        remedy="Use another template (template: chatml, …); this one loops or grows without bound.",
    )


def _count_nodes(value: Any) -> int:
    """Members of a container as a walk meets them (shared parts count each time, as printing them would)."""
    count, stack = 0, [value]
    while stack:
        item = stack.pop()
        members = item.values() if isinstance(item, dict) else item
        for member in members:
            count += 1
            if count > MAX_NODES:
                raise _over(f"it builds a list or dict of more than {MAX_NODES:,} members")
            if isinstance(member, (list, tuple, dict)):
                stack.append(member)
    return count


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`: accepted and transparent; our labels never depend on it."""

    tags = {"generation"}  # noqa: RUF012 - the name and type are Jinja's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _MeteredNodes(NodeTransformer):
    """Rewrites a parsed template so that whatever can repeat or grow passes the meter."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _metered(node.iter, "_metered_loop")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        joined: nodes.Expr = node.nodes[0]
        for part in node.nodes[1:]:
            joined = _metered(nodes.Concat([joined, part], lineno=node.lineno), "_metered")
        return joined

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _metered(node, "_metered") if node.items else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _metered(node, "_metered") if node.items else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _metered(node, "_metered") if node.items and node.ctx == "load" else node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        inner = node.filter
        node.filter = nodes.Filter(inner, "_metered", [], [], None, None, lineno=node.lineno)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        # Long fixed text inside a loop or macro is output too.
        return node if len(node.data) <= 256 else nodes.Const(node.data, lineno=node.lineno)


def _metered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)  # Jinja reads these fields by position


class _SafeNamespace(Namespace):
    """`namespace()` without underscore names."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold the name {name!r}")
        super().__setitem__(name, value)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, as chat templates expect it, with a meter on everything that grows."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self, today: date) -> None:
        self.meter = _Meter()
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols], finalize=self.meter.output
        )
        for name in _COSTLY_FILTERS:
            self.filters.pop(name, None)
        self.filters["tojson"] = _tojson
        self.filters = {name: self._metered_filter(name, function) for name, function in self.filters.items()}
        self.filters["_metered"] = self.meter.value
        self.filters["_metered_loop"] = self._loop
        self.globals.pop("lipsum", None)
        self.globals["namespace"] = _SafeNamespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = datetime(today.year, today.month, today.day).strftime

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _refuse_imports(tree)
        return _MeteredNodes().visit(tree)  # type: ignore[no-any-return]

    def _loop(self, items: Any) -> Any:
        if isinstance(items, Undefined):
            return items  # let Jinja raise its own error, or loop over nothing
        return _MeteredLoop(items, self.meter) if not hasattr(items, "__len__") else _sized_loop(items, self.meter)

    def _metered_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        meter = self.meter
        passes = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            args = _materialised(args, meter) if name == "join" else args
            _check_growth(name, args[passes:], kwargs)
            return meter.value(function(*args, **kwargs))

        return metered

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            args = _materialised(args, self.meter)
            _check_growth(getattr(obj, "__name__", ""), (owner, *args), kwargs)
        self.meter.charge()
        return self.meter.value(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operator(operator, left, right)
        return self.meter.value(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        pattern = str(value.__self__)

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_growth("format", (pattern, *args), kwargs)
            return wrapped(*args, **kwargs)

        return checked

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _COSTLY_METHODS and super().is_safe_attribute(obj, attr, value)


def _materialised(args: tuple[Any, ...], meter: _Meter) -> tuple[Any, ...]:
    """Generators among the arguments as lists, each item charged, so that their size is known before they are joined."""
    return tuple(list(_MeteredLoop(item, meter)) if isinstance(item, Iterator) else item for item in args)


class _MeteredLoop:
    """Items of a generator, each one charged."""

    def __init__(self, items: Iterable[Any], meter: _Meter) -> None:
        self._items, self._meter = iter(items), meter

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self._meter.charge()
        return next(self._items)


def _sized_loop(items: Any, meter: _Meter) -> Any:
    """A list, string, dict or range keeps its type (loops ask for its length); its whole length is charged at once."""
    meter.charge(len(items))
    return items


def _check_growth(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse, before it happens, a string method or filter whose result would be huge."""
    for number in (*args[1:], *kwargs.values()):
        if isinstance(number, int) and abs(number) > MAX_WIDTH:
            raise _over(f"it gives {name!r} the number {number:,}")
    value = args[0] if args else None
    if name == "replace" and len(args) >= 3:
        text, old, new = str(value), str(args[1]), str(args[2])
        _refuse_above(text.count(old) * len(new) + len(text))
    elif name == "join":
        _refuse_join(args, kwargs)
    elif name == "indent" and isinstance(value, str):
        width = next((item for item in (*args[1:], *kwargs.values()) if isinstance(item, (int, str))), 4)
        _refuse_above((value.count("\n") + 1) * (width if isinstance(width, int) else len(width)) + len(value))
    elif name == "format":
        _check_format(str(value))


def _refuse_join(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """`separator.join(items)` and `items|join(separator)`, when the items can be counted beforehand."""
    separator = next((item for item in (*args, *kwargs.values()) if isinstance(item, str)), "")
    items = next((item for item in args if isinstance(item, (list, tuple))), ())
    _refuse_above(len(items) * len(separator) + sum(len(item) for item in items if isinstance(item, str)))


def _check_operator(operator: str, left: Any, right: Any) -> None:
    if operator == "*":
        for sized, times in ((left, right), (right, left)):
            if isinstance(sized, (str, list, tuple)) and isinstance(times, int):
                _refuse_above(len(sized) * times if isinstance(sized, str) else len(sized) * times * (MAX_CHARS // MAX_NODES))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _refuse_above(left.bit_length() * max(right, 0))
    elif operator == "%" and isinstance(left, str):
        _check_format(left)


def _check_format(pattern: str) -> None:
    if "*" in pattern or re.search(r"\d{5}", pattern):
        raise _over("it formats text with a width that is very large or computed")


def _refuse_above(chars: int) -> None:
    if chars > MAX_CHARS:
        raise _over(f"it would build a text of more than {MAX_CHARS:,} characters")


def _refuse_imports(tree: nodes.Template) -> None:
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        raise TemplateSyntaxError("a chat template cannot include or import other templates", node.lineno)


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as chat templates expect it: without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class CompiledTemplate:
    """One template, compiled once; `render` is metered and turns every failure into a `DataError`.

    `name` is used in messages. Not for two threads at the same time with different dates: the date belongs to it.
    """

    def __init__(self, source: str, name: str, today: date = FIXED_DATE) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise DataError(
                "TEMPLATE_INVALID", f"The chat template {name!r} is larger than {MAX_SOURCE_CHARS:,} characters.", where=name
            )
        self.name = name
        self.source = source
        self._environment = MeteredEnvironment(today)
        try:
            self._template = self._environment.from_string(source)
        except (TemplateError, RecursionError, ValueError, OverflowError, MemoryError) as error:
            raise DataError(
                "TEMPLATE_INVALID",
                f"The chat template {name!r} is not valid Jinja: {error}",
                where=f"{name}:{getattr(error, 'lineno', None) or 1}",
                remedy="Correct the template, or choose a built-in one (template: chatml).",
            ) from error

    def render(self, **variables: Any) -> str:
        """The rendered text. Raises TemplateRefusal, or DataError TEMPLATE_UNSAFE / TEMPLATE_TOO_COSTLY."""
        self._environment.meter.start()
        try:
            return self._template.render(**variables)
        except SecurityError as error:
            raise DataError(
                "TEMPLATE_UNSAFE",
                f"The chat template {self.name!r} tried something a template may not do: {error}",
                where=self.name,
                remedy="Do not use this template; it reaches for Python internals.",
            ) from error
        except UndefinedError as error:
            raise self._refusal(f"it needs a value that is not there ({error})") from error
        except TemplateError as error:
            raise self._refusal(str(error)) from error
        except RecursionError as error:
            raise _over("it calls itself without end") from error
        except MemoryError as error:
            raise _over("it needs more memory than there is") from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            raise self._refusal(f"{type(error).__name__}: {error}") from error

    def _refusal(self, reason: str) -> TemplateRefusal:
        return TemplateRefusal(
            "TEMPLATE_REFUSED", f"The chat template {self.name!r} refuses this conversation: {reason}", where=self.name
        )
