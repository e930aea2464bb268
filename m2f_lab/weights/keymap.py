"""Two names for one tensor: tables that translate state dicts, read in both directions.

A table is a list of rules such as

    Rule("backbone.network.layers.{i+1}.downsample.*", "backbone.layers.{i}.downsample.*")

with our name on the left and the other format's on the right. `{i}` stands for a number, which may be shifted, and a
final `*` for whatever follows. Where one of our tensors is several of theirs, the right side lists them in order:
they are joined along the first dimension. Where the channels of a tensor are ordered differently, the rule says how.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from m2f_lab.data.dataset import abbreviate

_FIELD = re.compile(r"\{(?P<name>[a-z])(?P<shift>[+-]\d+)?\}|\*")


@dataclass(frozen=True)
class Reordering:
    """Another order of the same channels.

    Attributes:
        reason: what is reordered and why, for the report.
        to_ours: their tensor → ours.
        to_theirs: our tensor → theirs.
    """

    reason: str
    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


class Rule:
    """One line of a table.

    Args:
        ours: our name.
        theirs: the other format's name, or several, whose tensors are joined to ours along the first dimension.
        reordering: set where the order of channels differs as well.
    """

    def __init__(self, ours: str, theirs: str | tuple[str, ...], reordering: Reordering | None = None) -> None:
        self.ours = ours
        self.theirs = (theirs,) if isinstance(theirs, str) else theirs
        self.reordering = reordering
        self.our_regex = _regex(ours)
        self.their_regexes = tuple(_regex(name) for name in self.theirs)

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return tensor if self.reordering is None else self.reordering.to_ours(tensor)

    def to_theirs(self, tensor: Tensor) -> list[Tensor]:
        if self.reordering is not None:
            tensor = self.reordering.to_theirs(tensor)
        return [tensor] if len(self.theirs) == 1 else list(tensor.chunk(len(self.theirs)))


def rules(
    table: Iterable[tuple], *, ours: str = "", theirs: str = "", reordering: Reordering | None = None
) -> tuple[Rule, ...]:
    """Rules from pairs of names that share a prefix on each side."""
    return tuple(
        Rule(ours + left, tuple(theirs + r for r in ((right,) if isinstance(right, str) else right)), reordering)
        for left, right in table
    )


@dataclass
class Translation:
    """State dict under our names, and its origins.

    Attributes:
        tensors: by our names.
        origins: our name → their names.
        joined: our names of tensors put together from several of theirs.
        reordered: reason → our names of the tensors whose channels were reordered.
        ignored: reason → their names of entries that are no part of the model.
        incomplete: our name → their names that are missing to put it together.
        unknown: their names that no rule mentions.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    origins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    joined: list[str] = field(default_factory=list)
    reordered: dict[str, list[str]] = field(default_factory=dict)
    ignored: dict[str, list[str]] = field(default_factory=dict)
    incomplete: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class KeyMap:
    """Names of the tensors of a model in another format.

    Attributes:
        name: the format, in words.
        signature: a state dict with a key that starts like this is of this format.
        rules: the table; for every name the first rule that fits counts.
        ignored: names (a leading `*` stands for any beginning) of entries that are no part of the model → the reason.
        older_names: regular expression and replacement, for names that older or newer releases used instead.
    """

    name: str
    signature: str
    rules: tuple[Rule, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)
    older_names: tuple[tuple[str, str], ...] = ()

    def recognises(self, keys: Iterable[str]) -> bool:
        return any(key.startswith(self.signature) for key in keys)

    def to_ours(self, state: Mapping[str, Tensor]) -> Translation:
        """Translate a state dict of this format. Names without a place are listed; nothing raises."""
        result = Translation()
        parts: dict[str, dict[int, tuple[str, Tensor]]] = {}  # our name → number of the part → their name, tensor
        found_rules: dict[str, Rule] = {}
        for key, tensor in state.items():
            name = self._current_name(key)
            reason = next((why for pattern, why in self.ignored.items() if _matches(pattern, name)), None)
            if reason is not None:
                result.ignored.setdefault(reason, []).append(key)
                continue
            found = self._find(name)
            if found is None:
                result.unknown.append(key)
                continue
            rule, number, values = found
            ours = _fill(rule.ours, values)
            found_rules[ours] = rule
            parts.setdefault(ours, {})[number] = (key, tensor)

        for ours, by_number in parts.items():
            rule = found_rules[ours]
            missing = [name for n, name in enumerate(rule.theirs) if n not in by_number]
            if missing:
                values = _values(rule.our_regex, ours)
                result.incomplete[ours] = [_fill(name, values) for name in missing]
                continue
            in_order = [by_number[n] for n in range(len(rule.theirs))]
            result.tensors[ours] = rule.to_ours([tensor for _, tensor in in_order])
            result.origins[ours] = tuple(key for key, _ in in_order)
            if len(in_order) > 1:
                result.joined.append(ours)
            if rule.reordering is not None:
                result.reordered.setdefault(rule.reordering.reason, []).append(ours)
        return result

    def to_theirs(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Translate one of our state dicts.

        Raises:
            ValueError: the format has no names for some tensors, usually those of a backbone it does not know.
        """
        result, unknown = {}, []
        for key, tensor in state.items():
            rule, values = next(
                ((rule, values) for rule in self.rules if (values := _values(rule.our_regex, key)) is not None),
                (None, None),
            )
            if rule is None:
                unknown.append(key)
                continue
            for theirs, part in zip(rule.theirs, rule.to_theirs(tensor), strict=True):
                result[_fill(theirs, values)] = part.contiguous()
        if unknown:
            raise ValueError(
                f"{self.name} has no names for {len(unknown)} of {len(state)} tensors: {abbreviate(unknown, 6)}. "
                "Export a model whose backbone that format knows, or keep it in our own format with save_weights."
            )
        return result

    def _current_name(self, key: str) -> str:
        for pattern, replacement in self.older_names:
            key = re.sub(pattern, replacement, key)
        return key

    def _find(self, name: str) -> tuple[Rule, int, dict[str, int | str]] | None:
        for rule in self.rules:
            for number, regex in enumerate(rule.their_regexes):
                values = _values(regex, name)
                if values is not None:
                    return rule, number, values
        return None


def _regex(pattern: str) -> tuple[re.Pattern, dict[str, int]]:
    """A pattern as a regular expression, and the shift of each of its numbers."""
    expression, position, shifts = "", 0, {}
    for match in _FIELD.finditer(pattern):
        expression += re.escape(pattern[position : match.start()])
        name = match["name"]
        if name is None:
            expression += "(?P<rest>.+)"
        else:
            expression += rf"(?P<{name}>\d+)"
            shifts[name] = int(match["shift"] or 0)
        position = match.end()
    return re.compile(expression + re.escape(pattern[position:])), shifts


def _values(regex: tuple[re.Pattern, dict[str, int]], name: str) -> dict[str, int | str] | None:
    """Read the fields of a pattern off a name; None where it does not fit."""
    expression, shifts = regex
    match = expression.fullmatch(name)
    if match is None:
        return None
    return {key: text if key == "rest" else int(text) - shifts[key] for key, text in match.groupdict().items()}


def _fill(pattern: str, values: Mapping[str, int | str]) -> str:
    def text(match: re.Match) -> str:
        if match["name"] is None:
            return str(values["rest"])
        return str(values[match["name"]] + int(match["shift"] or 0))

    return _FIELD.sub(text, pattern)


def _matches(pattern: str, name: str) -> bool:
    return name.endswith(pattern[1:]) if pattern.startswith("*") else name == pattern
