"""A model's TEMPLATE layer: what Ollama makes of messages with it, and what it tells of the answer.

Rules of Ollama v0.33: ``template/template.go`` (rendering), ``tools/template.go`` and
``thinking/template.go`` (what surrounds tool calls and thinking), ``server/images.go`` (Go template or the
GGUF's own jinja template).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from shard.go_template import JsonList, JsonMap, Record, Tree, Unsupported, parse, render
from shard.go_template.nodes import (
    Action,
    Branch,
    Call,
    Command,
    Field,
    Node,
    Nodes,
    Operand,
    Pipe,
    Text,
    Variable,
)

Message = Mapping[str, Any]

# What Ollama gives a model that has no template at all.
DEFAULT_TEMPLATE = "{{ .Prompt }}"

_RESPONSE = Action(Pipe((Command((Field(("Response",)),)),)))


@dataclass(frozen=True)
class ChatTemplate:
    """A parsed TEMPLATE; make one with :func:`chat_template`."""

    source: str
    tree: Tree

    @cached_property
    def variables(self) -> frozenset[str]:
        """Every field and variable that the template names, in lower case."""
        nodes = [*self.tree.root, *(node for body in self.tree.defined.values() for node in body)]
        return frozenset(name.lower() for node in nodes for name in _identifiers(node))

    @cached_property
    def tool_tag(self) -> str:
        """What comes before a tool call in an answer, "{" where the template does not tell."""
        branch = _tool_calls_branch(self.tree.root)
        text = _first_text(branch.body) if branch else None
        return text.strip().replace("\r\n", "\n").split("{")[0] or "{" if text is not None else "{"

    @cached_property
    def thinking_tags(self) -> tuple[str, str] | None:
        """What surrounds thinking in an answer, None for a model that does not think."""
        opening, closing = _thinking_tags(self.tree.root)
        return (opening, closing) if opening and closing else None

    @property
    def capabilities(self) -> list[str]:
        """What the template lets a model do beyond completing, in Ollama's words."""
        can = {
            "tools": "tools" in self.variables,
            "insert": "suffix" in self.variables,
            "thinking": self.thinking_tags is not None,
        }
        return [name for name, yes in can.items() if yes]

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), think: Any = None
    ) -> str:
        """Return the prompt for a conversation, up to where the model goes on.

        Raises shard.go_template.TemplateError.
        """
        system, merged = collate(messages)
        extra = _think_values(think)
        if "messages" in self.variables:
            values = {
                "System": system,
                "Messages": [_message(message) for message in merged],
                "Tools": JsonList(_tool(tool) for tool in tools),
                "Response": "",
            }
            return render(self.tree, values | extra)
        # A template of single turns is filled in once a turn, and the last time only up to the response.
        *earlier, last = _turns(merged)
        cut = replace(self.tree, root=_cut(self.tree.root)[0])
        return "".join([*(render(self.tree, turn | extra) for turn in earlier), render(cut, last | extra)])

    def render_infill(self, prompt: str, suffix: str, *, think: Any = None) -> str:
        """Return the prompt for what stands between ``prompt`` and ``suffix``."""
        values = {"Prompt": prompt, "Suffix": suffix, "Response": ""}
        return render(self.tree, values | _think_values(think))


def chat_template(source: str) -> ChatTemplate:
    """Return a template ready to render. Raises Unsupported if it is malformed or beyond this engine."""
    tree = parse(source)
    template = ChatTemplate(source, tree)
    if not {"messages", "response"} & template.variables:
        template = ChatTemplate(source, replace(tree, root=(*tree.root, _RESPONSE)))
    return template


@dataclass(frozen=True, slots=True)
class Rendering:
    """How prompts are made: by ``template``, or, if that is None, by llama-server's jinja engine."""

    template: ChatTemplate | None
    reason: str


def choose(source: str | None, jinja: str | None, *, renderer: str = "", family: str = "") -> Rendering:
    """Return which of a model's templates makes its prompts, as Ollama chooses, and the sentence why.

    ``source`` is the TEMPLATE layer, ``jinja`` the GGUF's own template, ``renderer`` the renderer or parser
    built into Ollama that the model's config names.
    """
    if renderer:
        return Rendering(
            None, f'Ollama\'s built-in renderer "{renderer}" is not reproduced; {_fallback(jinja)} is used'
        )
    if source is None:
        return Rendering(None, f"the model has no TEMPLATE; {_fallback(jinja)} is used")
    if family in ("gptoss", "gpt-oss") and "<|start|>" in source and "<|end|>" in source:
        return Rendering(None, f"Ollama's harmony parser is not reproduced; {_fallback(jinja)} is used")
    try:
        template = chat_template(source)
    except Unsupported as refusal:
        return Rendering(None, f"{refusal}; {_fallback(jinja)} is used")
    if jinja and _prefers_jinja(jinja, template):
        return Rendering(None, "the GGUF's jinja template can do more than the TEMPLATE and is used")
    return Rendering(template, "the model's Go TEMPLATE is used")


def _fallback(jinja: str | None) -> str:
    return "the GGUF's jinja template" if jinja else "the text as it is"


# How a jinja template shows that it takes a tool's result back.
_JINJA_TOOL_RESULTS = (
    "tool_response",
    "tool_results",
    "ipython",
    *(f"role{end} == {mark}tool{mark}" for end in ("']", '"]') for mark in "'\""),
    *(f"message.role == {mark}tool{mark}" for mark in "'\""),
)


def jinja_capabilities(jinja: str) -> list[str]:
    """Return what a jinja template lets a model do beyond completing."""
    can = {
        "tools": "tools" in jinja or "tool_call" in jinja,
        "thinking": "enable_thinking" in jinja or "<think>" in jinja,
    }
    return [name for name, yes in can.items() if yes]


def _prefers_jinja(jinja: str, template: ChatTemplate) -> bool:
    theirs, ours = jinja_capabilities(jinja), template.capabilities
    calls = "tool_calls" in jinja or "assistant_tool_call" in jinja
    they_return = "tools" in theirs and calls and any(sign in jinja for sign in _JINJA_TOOL_RESULTS)
    we_return = {"tools", "toolcalls"} <= template.variables and any(
        sign in template.source for sign in ('eq .Role "tool"', "tool_response", "TOOL_RESULTS")
    )
    if len(theirs) > len(ours):
        return they_return or not we_return
    return set(theirs) == set(ours) and "tools" in ours and they_return and not we_return


def collate(messages: Sequence[Message]) -> tuple[str, list[dict[str, Any]]]:
    """Return all system texts as one, and the messages with those of one role in a row made one."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content") or ""
        if merged and merged[-1].get("role") == message.get("role") != "tool":
            merged[-1]["content"] += f"\n\n{content}"
        else:
            merged.append(dict(message) | {"content": content})
    system = [message.get("content") or "" for message in messages if message.get("role") == "system"]
    return "\n\n".join(system), merged


def _turns(messages: Sequence[Message]) -> Iterator[dict[str, str]]:
    """Yield the values of each turn; the last one is that which the model answers."""
    turn = {"System": "", "Prompt": "", "Response": ""}
    # A message of this role closes the turn if one of these is already filled.
    closes = {"system": ("Prompt", "Response"), "user": ("Response",)}
    fields = {"system": "System", "user": "Prompt", "assistant": "Response"}
    for message in messages:
        role = message.get("role") or ""
        if any(turn[name] for name in closes.get(role, ())):
            yield turn
            turn = dict.fromkeys(turn, "")
        if role in fields:
            turn[fields[role]] = message["content"]
    yield turn


def _think_values(think: Any) -> dict[str, Any]:
    # Ollama takes a plain "true" for the middle one of its levels.
    level = "medium" if think is True else think or ""
    return {"Think": bool(think), "ThinkLevel": level, "IsThinkSet": think is not None}


def go_data(value: Any) -> Any:
    """Return JSON data as Go reads it into an ``any``: every number is a float."""
    if isinstance(value, Mapping):
        return {key: go_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [go_data(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _message(message: Message) -> Record:
    fields = {
        "Role": message.get("role") or "",
        "Content": message["content"],
        "Thinking": message.get("thinking") or "",
        "Images": list(message.get("images") or ()),
        "ToolCalls": [_tool_call(call) for call in message.get("tool_calls") or ()],
        "ToolName": message.get("tool_name") or "",
        "ToolCallID": message.get("tool_call_id") or "",
    }
    return Record(fields, fields)


def _tool_call(call: Mapping[str, Any]) -> Record:
    function = call.get("function") or {}
    fields = {
        "Index": function.get("index") or 0,
        "Name": function.get("name") or "",
        "Arguments": JsonMap(go_data(function.get("arguments") or {})),
    }
    return Record({"ID": call.get("id") or "", "Function": Record(fields, fields)}, call)


def _tool(tool: Mapping[str, Any]) -> Record:
    function = tool.get("function") or {}
    parameters = function.get("parameters") or {}
    given = parameters.get("properties")
    properties = JsonMap({name: _property(schema) for name, schema in (given or {}).items()})
    required = list(parameters.get("required") or ())
    known = {
        "type": parameters.get("type") or "",
        "$defs": go_data(parameters.get("$defs")),
        "items": go_data(parameters.get("items")),
        "required": required,
    }
    shown = {"type": known["type"]} | {key: value for key, value in known.items() if value}
    parameters_record = Record(
        {
            "Type": known["type"],
            "Defs": known["$defs"],
            "Items": known["items"],
            "Required": required,
            "Properties": properties,
        },
        shown | {"properties": None if given is None else properties},
    )
    named = {"name": function.get("name") or "", "description": function.get("description") or ""}
    function_record = Record(
        {"Name": named["name"], "Description": named["description"], "Parameters": parameters_record},
        named | {"parameters": parameters_record},
    )
    kind, items = tool.get("type") or "", go_data(tool.get("items"))
    data = {"type": kind} | ({"items": items} if items is not None else {}) | {"function": function_record}
    return Record({"Type": kind, "Items": items, "Function": function_record}, data)


# The members of a parameter's schema that Ollama keeps, and what the template calls them.
_PROPERTY_FIELDS = {
    "anyOf": "AnyOf",
    "type": "Type",
    "items": "Items",
    "description": "Description",
    "enum": "Enum",
    "properties": "Properties",
    "required": "Required",
}


def _property(given: Any) -> Record:
    schema = go_data(given) if isinstance(given, Mapping) else {}
    kinds = schema.get("type") or []
    kind = kinds[0] if isinstance(kinds, list) and len(kinds) == 1 else kinds
    values = {key: schema.get(key) for key in _PROPERTY_FIELDS} | {"type": kind}
    for key in ("anyOf", "properties"):
        nested = values[key]
        if isinstance(nested, list):
            values[key] = [_property(item) for item in nested]
        elif isinstance(nested, Mapping):
            values[key] = {name: _property(item) for name, item in nested.items()}
    shown = {key: value for key, value in values.items() if value}
    return Record({name: _or_text(values[key]) for key, name in _PROPERTY_FIELDS.items()}, shown)


def _or_text(value: Any) -> Any:
    return "" if value is None or value == [] else value


# What a template's tree tells of it.


def _identifiers(node: Node) -> Iterator[str]:
    match node:
        case Action(pipe) | Call(_, Pipe() as pipe):
            yield from _pipe_identifiers(pipe)
        case Branch():
            yield from _pipe_identifiers(node.pipe)
            for inner in (*node.body, *(node.orelse or ())):
                yield from _identifiers(inner)


def _pipe_identifiers(pipe: Pipe) -> Iterator[str]:
    for operand in _operands(pipe):
        match operand:
            case Field(names):
                yield from names
            case Variable(name, names):
                yield from (name, *names)


def _operands(pipe: Pipe) -> Iterator[Operand]:
    """Yield a pipeline's operands, those in parentheses too."""
    for command in pipe.commands:
        for operand in command.operands:
            if isinstance(operand, Pipe):
                yield from _operands(operand)
            else:
                yield operand


def _cut(nodes: Nodes) -> tuple[Nodes, bool]:
    """Return a tree up to the response's place, and whether it has one."""
    kept: list[Node] = []
    for node in nodes:
        found = False
        if isinstance(node, Action):
            found = any(
                isinstance(operand, Field) and "Response" in operand.names for operand in _operands(node.pipe)
            )
        elif isinstance(node, Branch):
            body, found = _cut(node.body)
            orelse = node.orelse
            if found:
                orelse = () if orelse is not None else None
            elif orelse is not None:
                orelse, found = _cut(orelse)
            node = replace(node, body=body, orelse=orelse)
        kept.append(node)
        if found:
            return tuple(kept), True
    return tuple(kept), False


def _tool_calls_branch(nodes: Nodes) -> Branch | None:
    """Return the first ``if`` that asks for ``.ToolCalls``, outermost first."""
    for node in nodes:
        if not isinstance(node, Branch):
            continue
        asked = [operand for command in node.pipe.commands for operand in command.operands]
        if node.kind == "if" and any(isinstance(one, Field) and "ToolCalls" in one.names for one in asked):
            return node
        if found := _tool_calls_branch(node.body) or _tool_calls_branch(node.orelse or ()):
            return found
    return None


def _first_text(nodes: Nodes) -> str | None:
    """Return the text that a branch begins with, looking into the branch that it begins with."""
    for node in nodes:
        match node:
            case Text(text):
                return text
            case Branch():
                found = _first_text(node.body)
                return found if found is not None else _first_text(node.orelse or ())
            case Action():
                return None
    return None


def _thinking_tags(root: Nodes) -> tuple[str, str]:
    """Return what begins and ends the list of nodes around ``.Thinking``, within a range over messages."""
    tags = ["", ""]

    def visit(nodes: Nodes, over_messages: bool) -> None:
        for node in nodes:
            match node:
                case Action(pipe) | Branch(pipe=pipe):
                    inside = over_messages
                    if isinstance(node, Branch) and node.kind == "range":
                        inside = _names_first(pipe, "Messages")
                    if inside and _names_first(pipe, "Thinking"):
                        for at, edge in enumerate((nodes[0], nodes[-1])):
                            if isinstance(edge, Text):
                                tags[at] = edge.text.strip()
                    if isinstance(node, Branch):
                        visit(node.body, inside)
                        visit(node.orelse or (), inside)

    visit(root, False)
    return tags[0], tags[1]


def _names_first(pipe: Pipe, field: str) -> bool:
    return any(isinstance(operand, Field) and operand.names[0] == field for operand in _operands(pipe))
