"""What a server takes of its clients."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of requests, queues and memories; what is beyond one is answered by its status code."""

    body: int = 1 << 20  # bytes of a request (413)
    prompt: int = 16_384  # characters of a text (400)
    prompts: int = 16  # of a request (400)
    max_tokens: int = 512  # of an answer (400)
    facts: int = 1_000  # of a request (413)
    memory_facts: int = 10_000  # of a memory (409)
    memories: int = 1_000  # on the disk (409)
    open_memories: int = 32  # at a time; the one that was used the longest ago is closed
    idle_seconds: float = 600.0  # after which a memory is closed
    queue: int = 256  # questions that wait (429)
    writes: int = 64  # changes of a memory that wait (429)
    batch: int = 16  # questions that are decoded together
