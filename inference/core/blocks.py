"""The block manager: hands out the KV cache's blocks, counts references, shares computed prefixes.

Every usable block is free (nothing in it is of use), idle (computed and published, no reference; evicted when free ones
run out) or referenced (in as many live tables as its count says). Block 0 is the null block, the target of padding.
Only computed blocks are shared that nobody writes to any more, so a block that is still written to has exactly one
owner: a choice that takes over its parent's prompt gets a copy of the last, partly filled block (copy on write).

Where every layer looks back over a window only, blocks wholly behind it are given back while their request runs: what
was published of them stays until it is evicted. A prefix is found whole or not at all.

What cross-attention reads of an encoder has blocks of its own in the same pool, a request's memory. Live requests of
one encoder input share them: the choices of a request, and whoever sends the same again.
"""

from collections.abc import Iterable

from .prefix import PrefixCache
from .request import Request

NULL = 0
"""The null block, the target of padding; it stands in a table where a block was given back."""

FREE, CACHED, USED = range(3)
"""Of a block's states: nobody needs it, it keeps a prefix, live requests hold it."""


class BlockManager:
    """Owns block ids, not tensors; a failed call changes nothing.

    Args:
        num_blocks: size of the pool, the null block included.
        block_size: tokens in a block.
        enable_prefix_caching: share computed prefixes.
        fingerprint: model version and KV precision; prefixes never match across different ones.
        window: a token sees its own position and the window - 1 before it; None = all before it.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_caching: bool = True,
        fingerprint: bytes = b"",
        window: int | None = None,
    ) -> None:
        self.block_size = block_size
        self.num_usable = num_blocks - 1
        self.free = list(range(num_blocks - 1, 0, -1))
        self.counts = [0] * num_blocks
        self.prefix = PrefixCache(fingerprint)
        self.memories: dict[bytes, tuple[int, ...]] = {}
        """The memory of every encoder input that a live request holds."""
        self._caching = enable_prefix_caching
        self._window = window
        self._joint = 0
        """How many references blocks have beside their first."""

    shares = True
    """Whether requests may hold blocks together."""

    @property
    def num_available(self) -> int:
        return len(self.free) + len(self.prefix.idle)

    @property
    def usage(self) -> float:
        """Referenced / usable blocks."""
        return (self.num_usable - self.num_available) / self.num_usable

    def states(self) -> bytes:
        """What every usable block is, in the order of their ids: FREE, CACHED or USED. Any thread may look, and finds
        single blocks as they are at that moment."""
        counts, idle = self.counts, self.prefix.idle
        return bytes([USED if counts[block] else CACHED if block in idle else FREE for block in range(1, len(counts))])

    def utilisation(self, requests: Iterable[Request]) -> float:
        """Filled slots / slots of the referenced blocks, 0 when idle.

        Args:
            requests: all that hold blocks.
        """
        reserved = (self.num_usable - self.num_available) * self.block_size
        if not reserved:
            return 0.0
        filled: float = -self._joint * self.block_size  # counted in each of the tables that hold it, there once
        for request in requests:
            filled += request.num_computed_tokens - request.num_dropped_blocks * self.block_size
            if request.memory_table:
                slots = len(request.memory_table) * self.block_size
                unused = slots - len(request.encoder_token_ids or ())
                filled += slots - unused / self.counts[request.memory_table[0]]
        return filled / reserved

    def start(self, request: Request) -> bool:
        """Give a request without blocks all that its tokens need, reusing its parent's or its longest cached prefix.

        At least one token is left to compute, because the next one is sampled from its logits. With an encoder it
        also gets its memory.

        Returns:
            Whether there was room; then `num_computed_tokens` counts the reused tokens, and `copied_block`, if it is
            not None, is to be copied to the block after the reused ones before anything is computed.
        """
        parent = self._parent(request)
        reused = self._match(request) if parent is None else parent.block_table[: self._shared(request)]
        missing = self._needed(request) - len(reused)
        encode = self.to_encode(request)
        if missing + self.spanned(encode) > self.num_available - sum(self.counts[block] == 0 for block in reused):
            return False
        for block in reused:
            self._reference(block)
        self._remember(request, encode)
        request.block_table = reused + [self._take() for _ in range(missing)]
        request.num_published_blocks = len(reused)
        request.num_computed_tokens = len(reused) * self.block_size
        if parent is not None:
            request.num_published_blocks = min(len(reused), parent.num_published_blocks)
            request.num_computed_tokens = len(request.prompt_token_ids) - 1
            if request.num_computed_tokens % self.block_size:
                request.copied_block = parent.block_table[len(reused)]
        request.num_launched_tokens = request.num_computed_tokens
        return True

    def _parent(self, request: Request) -> Request | None:
        """The request whose blocks hold the whole prompt just now, if this one has nothing else yet."""
        parent, prompt = request.parent, len(request.prompt_token_ids)
        if parent is None or not parent.block_table or parent.num_dropped_blocks or request.num_tokens > prompt:
            return None
        return parent if parent.num_computed_tokens >= prompt else None

    def _shared(self, request: Request) -> int:
        """Full blocks of a prompt of which the last token is computed again."""
        return (len(request.prompt_token_ids) - 1) // self.block_size

    def to_encode(self, request: Request) -> int:
        """How many encoder tokens a request must compute when it starts: none if a live one has computed them.

        One that starts in the same step counts as well: nothing that starts later can outrank it and drop it.
        """
        ids = request.encoder_token_ids
        return 0 if ids is None or (self._caching and self.prefix.root(request) in self.memories) else len(ids)

    def spanned(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def cached_tokens(self, request: Request) -> int:
        """How many of its tokens `start` would find in the prefix cache."""
        return len(self._match(request)) * self.block_size

    def extend(self, request: Request) -> bool:
        """Lengthen a table to cover all of the request's tokens; False = no room."""
        missing = self._needed(request) - len(request.block_table)
        if missing > self.num_available:
            return False
        for _ in range(missing):
            request.block_table.append(self._take())
        return True

    def publish(self, request: Request) -> None:
        """Enter the request's newly computed full blocks into the prefix cache.

        A prefix that is there already (two requests computed it side by side) is kept once: the table takes the
        published block and gives its own back, once no launched step knows it any more. So the parent of a published
        block is published and outlives it.
        """
        for block in request.replaced_blocks:
            self._drop(block)
        request.replaced_blocks.clear()
        full = request.num_computed_tokens // self.block_size
        first = request.num_published_blocks
        if not self._caching or full == first:
            return
        names = self.prefix.hashes(request, full, self.block_size)
        for i in range(first, full):
            own, known = request.block_table[i], self.prefix.block_of.get(names[i])
            if known is None:
                self.prefix.insert(names[i], own)
            else:
                self._reference(known)
                request.block_table[i] = known
                if request.in_flight:
                    request.replaced_blocks.append(own)
                else:
                    self._drop(own)
        request.num_published_blocks = full

    def drop_passed(self, request: Request) -> None:
        """Give back the blocks that no later token of the request can see; a launched step reads none of them either.

        The last full block stays, because the counters of its experts go on from there.
        """
        if self._window is None:
            return
        computed, size = request.num_computed_tokens, self.block_size
        passed = min((computed - self._window + 1) // size, computed // size - 1)
        for i in reversed(range(request.num_dropped_blocks, passed)):
            self._drop(request.block_table[i])
            request.block_table[i] = NULL
        request.num_dropped_blocks = max(request.num_dropped_blocks, passed)

    def release(self, request: Request) -> None:
        """Take all blocks back, tails first, so that a prefix loses its tail before its head."""
        for block in reversed((*request.replaced_blocks, *request.block_table)):
            self._drop(block)
        request.replaced_blocks, request.block_table = [], []
        self._forget(request)
        request.num_published_blocks = request.num_dropped_blocks = 0
        request.num_computed_tokens = request.num_launched_tokens = 0
        request.copied_block = None

    def _needed(self, request: Request) -> int:
        return self.spanned(len(request.token_ids) + request.num_pending_tokens)

    def _remember(self, request: Request, encode: int) -> None:
        """Give a request its memory: new blocks for `encode` tokens, or those that are there."""
        request.num_unencoded_tokens = encode
        if request.encoder_token_ids is None:
            return
        if encode:
            request.memory_table = tuple(self._take() for _ in range(self.spanned(encode)))
            if self._caching:
                self.memories[self.prefix.root(request)] = request.memory_table
            return
        request.memory_table = self.memories[self.prefix.root(request)]
        for block in request.memory_table:
            self._reference(block)

    def _forget(self, request: Request) -> None:
        for block in request.memory_table:
            self._drop(block)
        if request.memory_table and not self.counts[request.memory_table[0]]:
            self.memories.pop(request.root, None)
        request.memory_table = ()
        request.num_unencoded_tokens = 0

    def _match(self, request: Request) -> list[int]:
        if not self._caching or not request.params.reads_prefix:
            return []
        blocks = []
        for name in self.prefix.hashes(request, (request.num_tokens - 1) // self.block_size, self.block_size):
            block = self.prefix.block_of.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _reference(self, block: int) -> None:
        self._joint += self.counts[block] > 0
        if self.counts[block] == 0:
            del self.prefix.idle[block]
        self.counts[block] += 1

    def _take(self) -> int:
        block = self.free.pop() if self.free else self.prefix.evict()
        self.counts[block] = 1
        return block

    def _drop(self, block: int) -> None:
        if block == NULL:
            return
        self.counts[block] -= 1
        if self.counts[block] > 0:
            self._joint -= 1
        elif block in self.prefix.hash_of:
            self.prefix.idle[block] = None
        else:
            self.free.append(block)


class ContiguousBlocks(BlockManager):
    """Reserves the longest sequence's blocks for every request at its start, in one run, as before PagedAttention.

    Nothing is shared, nothing grows, nobody is preempted; what a request does not fill is lost to the others. It is
    here to be compared with (Kwon et al. 2023, figure 2).

    Args:
        longest: tokens to reserve.
    """

    shares = False

    def __init__(self, num_blocks: int, block_size: int, *, longest: int) -> None:
        self._run = -(-longest // block_size)
        usable = (num_blocks - 1) // self._run * self._run  # whole runs only, so all that is free is whole runs
        super().__init__(1 + usable, block_size, enable_prefix_caching=False)

    def _needed(self, request: Request) -> int:
        return self._run
