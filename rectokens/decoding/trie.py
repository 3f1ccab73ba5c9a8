"""A pointer trie over token sequences: small, obvious, on the CPU.

It is the readable form of what ``CompactCSRTrie`` packs into arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class TrieNode:
    """One prefix.

    Attributes:
        children: the node reached by each next token.
        is_end_of_token: True if an inserted sequence ends here.
    """

    children: dict[int, TrieNode] = field(default_factory=dict)
    is_end_of_token: bool = False

    def take_step(self, idx: int) -> TrieNode | None:
        """The child reached by token ``idx``, or None."""
        return self.children.get(idx)


class Trie:
    """A set of token sequences, stored by shared prefix."""

    def __init__(self) -> None:
        self.root = TrieNode()

    def insert(self, sequence: Iterable[int]) -> None:
        """Add a sequence; adding it again changes nothing."""
        node = self.root
        for token in sequence:
            node = node.children.setdefault(int(token), TrieNode())
        node.is_end_of_token = True

    def find_prefix(self, prefix: Iterable[int]) -> TrieNode | None:
        """The node of ``prefix``, None if no sequence starts so; the empty prefix is the root."""
        node: TrieNode | None = self.root
        for token in prefix:
            if node is None:
                return None
            node = node.take_step(int(token))
        return node
