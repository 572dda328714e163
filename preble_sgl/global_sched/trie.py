"""The nodes of the prefix tree: how they are found, made, split and deleted.

One radix tree per namespace. Edges are packed int32 token ids (`bytes`), so that following an edge is one
memcmp, whatever its length; children are found by the bytes of their first token. Roots are not nodes: they
have no edge and nobody holds them. In the complexities below, n is the number of tokens (at memcmp speed)
and d the number of nodes on the way.
"""

from collections.abc import Iterator

from preble_sgl.core import TokenIds, WorkerId, common_prefix_len, token_ids
from preble_sgl.global_sched.block_index import BlockIndex
from preble_sgl.global_sched.invariants import check_node
from preble_sgl.global_sched.node import TOKEN_BYTES, Node, Share


class Trie:
    """Owns every node. `indexes`: of the workers whose runtimes tell what they have, kept right by splits."""

    def __init__(self) -> None:
        self._roots: dict[str, Node] = {}
        self._namespaces: dict[Node, str] = {}
        self.indexes: dict[WorkerId, BlockIndex] = {}
        self.num_nodes = 0

    def find(self, namespace: str, packed: bytes) -> tuple[list[Node], int]:
        """Return the nodes along `packed`, the last one perhaps in part, and the known tokens. O(n + d)."""
        path: list[Node] = []
        offset = 0
        node = self._roots.get(namespace)
        while node is not None:
            node = node.children.get(packed[offset : offset + TOKEN_BYTES])
            if node is not None:
                path.append(node)
                if packed.startswith(node.key, offset):
                    offset += len(node.key)
                else:
                    offset += common_prefix_len(node.key, packed, offset) * TOKEN_BYTES
                    break
        return path, offset // TOKEN_BYTES

    def root(self, namespace: str) -> Node:
        """Return the root of a namespace. Whoever asks puts a node below it."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(b"", None, 0, 0)
            self._namespaces[root] = namespace
        return root

    def roots(self) -> list[Node]:
        """Return the roots of all namespaces."""
        return list(self._roots.values())

    def node_at(self, start: Node, packed: bytes) -> Node:
        """Return the node that ends where `packed` behind `start` ends; creates, splits. O(n + d)."""
        node = start
        offset = 0
        while offset < len(packed):
            child = node.children.get(packed[offset : offset + TOKEN_BYTES])
            if child is None:
                return self._append(node, packed[offset:])
            if packed.startswith(child.key, offset):
                offset += len(child.key)
            else:
                common = common_prefix_len(child.key, packed, offset) * TOKEN_BYTES
                child = self.split(child, common)
                offset += common
            node = child
        return node

    def split(self, lower: Node, at: int) -> Node:
        """Cut an edge after `at` bytes. The existing object keeps the lower part; returns the upper."""
        parent = lower.parent
        assert parent is not None
        upper = self._append(parent, lower.key[:at])
        upper.children[lower.key[at : at + TOKEN_BYTES]] = lower
        upper.recent = dict(lower.recent)
        upper.expected = lower.expected
        lower.key = lower.key[at:]
        lower.num_tokens -= upper.num_tokens
        lower.parent = upper
        for worker_id, share in lower.shares.items():
            upper.shares[worker_id] = Share(
                share.last_used, share.computed, num_children=1, claims=dict(share.claims)
            )
            if share.blocks is not None:
                self.indexes[worker_id].split(upper, share)
        if not lower.is_key_portion:
            upper.trends, lower.trends = lower.trends, {}
        return upper

    def prune(self, node: Node) -> None:
        """Delete a node that nobody needs, and then its ancestors."""
        while node.parent is not None and not (node.shares or node.recent or node.children):
            del node.parent.children[node.key[:TOKEN_BYTES]]
            self.num_nodes -= 1
            node = node.parent
        if node.parent is None and not node.children and node in self._namespaces:
            del self._roots[self._namespaces.pop(node)]

    def prefix(self, node: Node) -> tuple[str, TokenIds]:
        """Return the namespace and the tokens of the prefix that a node completes. O(its tokens)."""
        keys = []
        while node.parent is not None:
            keys.append(node.key)
            node = node.parent
        tokens = token_ids()
        tokens.frombytes(b"".join(reversed(keys)))
        return self._namespaces[node], tokens

    def nodes(self) -> Iterator[Node]:
        """Yield every node, parents first."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check_invariants(self) -> None:
        """Assert that the nodes, their number and the names of the roots are right. O(nodes)."""
        nodes = list(self.nodes())
        assert self.num_nodes == len(nodes)
        for node in nodes:
            check_node(node)
        assert {node: name for name, node in self._roots.items()} == self._namespaces
        assert all(root.children for root in self._namespaces), "an empty namespace is forgotten"

    def _append(self, parent: Node, key: bytes) -> Node:
        num_tokens = len(key) // TOKEN_BYTES
        node = Node(key, parent, parent.end_len + num_tokens, num_tokens)
        parent.children[key[:TOKEN_BYTES]] = node
        self.num_nodes += 1
        return node
