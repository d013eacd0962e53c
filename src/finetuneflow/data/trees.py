"""Conversation trees: the best-ranked path, every path, and trees put together from rows linked by parent ids.

Place in the flow: used by `shapes` for OpenAssistant exports, nested or flat.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetuneflow.data.examples import Place

MAX_TREE_MESSAGES = 10_000  # what flat rows may hold in memory; real trees have some dozens


def replies_of(node: dict[str, Any]) -> list[dict[str, Any]]:
    """Replies that were not deleted, best rank first; unranked ones keep their order, after the ranked ones."""
    replies = node.get("replies")
    kept = (
        [reply for reply in replies if isinstance(reply, dict) and not reply.get("deleted")] if isinstance(replies, list) else []
    )
    return sorted(kept, key=_rank)


def _rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return float(rank) if isinstance(rank, int | float) and not isinstance(rank, bool) else float("inf")


def best_path(root: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """From the root down, always the best-ranked reply; and whether other branches were passed by."""
    path, others = [_turn(root)], False
    node = root
    while replies := replies_of(node):
        others = others or len(replies) > 1
        node = replies[0]
        path.append(_turn(node))
    return path, others


def every_path(root: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Every way from the root to a leaf, best-ranked first."""
    stack = [(root, [_turn(root)])]
    while stack:
        node, path = stack.pop()
        replies = replies_of(node)
        if not replies:
            yield path
        stack.extend((reply, [*path, _turn(reply)]) for reply in reversed(replies))


def ranked_replies(root: dict[str, Any]) -> Iterator[tuple[list[dict[str, Any]], float]]:
    """Every path to a ranked answer that has a ranked sibling, with its rank (0 is the best); siblings follow each other."""
    stack = [(root, [_turn(root)])]
    while stack:
        node, path = stack.pop()
        replies = replies_of(node)
        ranked = [reply for reply in replies if reply.get("role") == "assistant" and _rank(reply) < float("inf")]
        if len(ranked) > 1:
            yield from (([*path, _turn(reply)], _rank(reply)) for reply in ranked)
        stack.extend((reply, [*path, _turn(reply)]) for reply in reversed(replies))


def _turn(node: dict[str, Any]) -> dict[str, Any]:
    return {"role": node.get("role"), "content": node.get("text")}


class FlatTrees:
    """Rows of one tree in the order of the file: a message without parent starts a tree, parents come before replies."""

    def __init__(self) -> None:
        self._nodes: dict[str, dict[str, Any]] = {}
        self._root: dict[str, Any] | None = None
        self._places: list[Place] = []
        self._orphans: list[Place] = []

    @staticmethod
    def starts_new(message: dict[str, Any]) -> bool:
        return message.get("parent_id") is None

    def is_full(self) -> bool:
        """True when no more rows should be held; further rows of the same tree then lack their parent."""
        return len(self._places) + len(self._orphans) >= MAX_TREE_MESSAGES

    def add(self, place: Place, message: dict[str, Any]) -> None:
        node = {**message, "replies": []}
        parent = self._nodes.get(str(message.get("parent_id")))
        if parent is not None:
            parent["replies"].append(node)
        elif self.starts_new(message) and self._root is None:
            self._root = node
        else:
            self._orphans.append(place)
            return
        self._places.append(place)
        self._nodes[str(message["message_id"])] = node

    def take(self) -> Iterator[tuple[list[Place], dict[str, Any] | None, list[Place]]]:
        """The tree held (places of its rows, its root, places of rows without a parent), and forget it."""
        if self._places or self._orphans:
            held = (self._places, self._root, self._orphans)
            self._nodes, self._root, self._places, self._orphans = {}, None, [], []
            yield held
