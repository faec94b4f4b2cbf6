"""What the explorer's kernels agree on: words of a scenario, what actors have in hand, steps, what a page holds."""

from __future__ import annotations

__all__ = [
    "ACK_DONE",
    "ACK_FAILED",
    "ACK_KEPT",
    "ACK_NONE",
    "ALLOC_LISTS",
    "ALLOC_PAST",
    "ANSWER",
    "ANSWER_ASK",
    "BATCH",
    "BEGIN",
    "COMMAND",
    "CONTENT_MASK",
    "CONTENT_SHIFT",
    "DRAIN",
    "END",
    "ENDING",
    "END_ASK",
    "FREE_LISTS",
    "FREE_PAST",
    "IDLE",
    "ISOLATE_BLOCK",
    "KEEP",
    "KEPT",
    "K_ALLOCS",
    "K_ALLOCS_PAST",
    "K_CAPACITY",
    "K_ISOLATED",
    "K_KINDS",
    "K_PID",
    "K_POLICY",
    "K_SLOTS",
    "K_WORDS",
    "MOST_BLOCKS",
    "N_KINDS",
    "OWNER_MASK",
    "PULL",
    "PUT_BACK",
    "REARM",
    "REARMING",
    "REGISTER",
    "RELEASE",
    "ROTATE_LIST",
    "RUN",
    "SET_ASKING",
    "SET_TYPE",
    "STEP_NAMES",
    "STOP",
    "STOPPED",
    "UNISOLATE_BLOCK",
    "WALK",
    "WITHDRAW",
    "X_ACK",
    "X_ASKS",
    "X_BLOCKS",
    "X_COUNT",
    "X_DISCARDED",
    "X_DRAIN",
    "X_FAILED",
    "X_HOST",
    "X_MORE",
    "X_PHASE",
    "X_WORDS",
    "X_WORK",
]

# Words of a scenario, int64[K_WORDS].
# K_ALLOCS, K_ALLOCS_PAST: bit order * 8 + migratetype says that a vCPU allocates such. K_KINDS: bit kind of step.
K_POLICY, K_CAPACITY, K_KINDS, K_ALLOCS, K_ALLOCS_PAST, K_PID, K_SLOTS, K_ISOLATED, K_WORDS = range(9)

# What the actors have in hand, int64[X_WORDS].
MOST_BLOCKS = 4  # of a batch
(
    X_PHASE,  # where the reporter is, see below
    X_MORE,  # Cycle._more
    X_FAILED,  # 0, or the answer that ended the run: ACK_FAILED, or ACK_NONE + 4 for withdrawn
    X_COUNT,  # blocks in its hand
    X_HOST,  # blocks that the host has been told of and has not answered for
    X_DISCARDED,  # blocks of the batch that it has discarded
    X_ACK,  # the answer that waits for the reporter
    X_DRAIN,  # compaction has isolated a pageblock and has not yet drained the per-CPU lists
    X_WORK,  # value of the semaphore that the reporter sleeps on
    X_ASKS,  # by vCPU: 0, or 1 + the ask that it waits for
) = range(10)
X_BLOCKS = X_ASKS + 2  # pfns of the batch, then its orders
X_WORDS = X_BLOCKS + 2 * MOST_BLOCKS

# Where the reporter is.
IDLE = 0  # asleep
RUN = 1  # between begin and end, nothing in its hand
BATCH = 2  # has pulled a batch and sent it
ENDING = 3  # a pull said that nothing is left, or the report failed: only the end is missing
REARMING = 4  # the run failed, and is about to be asked for again
STOPPED = 5  # unregistered

# The host's answer.
ACK_NONE, ACK_DONE, ACK_KEPT, ACK_FAILED = range(4)

# What is known of a page, uint8[n_pages]: who owns it and who wrote to it last (0 nobody: zeros; 1, 2 the vCPUs).
OWNER_MASK = 0x3
CONTENT_SHIFT = 2
CONTENT_MASK = 0x3 << CONTENT_SHIFT
KEPT = 0x10  # the host took the report and discarded nothing (S12)

# Steps. Each is one call of a kernel that locks, works and unlocks, or something that happens outside the guest.
STEP_NAMES = (
    "alloc",  # first vCPU, through the per-CPU lists: order, migratetype
    "alloc_past",  # second vCPU, past them (or through its own): order, migratetype
    "free",  # pfn
    "free_past",  # pfn
    "drain",  # slot
    "end_ask",  # the vCPU that waits for a block: it was answered, or the wait is over
    "begin",
    "pull",
    "put_back",
    "withdraw",
    "end",
    "rearm",
    "stop",
    "register",
    "answer",  # the host discards so many blocks and answers: done if all, else failed
    "keep",  # it discards nothing, and says so
    "isolate",  # pageblock
    "unisolate",  # pageblock
    "set_type",  # pageblock, migratetype
    "rotate",  # order, migratetype: the second entry of that list comes first
    "command",  # the host starts a run
    "release",  # held blocks go back
    "walk",  # the whole walk under the lock, with this answer to each batch
    "answer_ask",  # ask, populated or refused
    "set_asking",  # the host shows that it answers
)
(
    ALLOC_LISTS,
    ALLOC_PAST,
    FREE_LISTS,
    FREE_PAST,
    DRAIN,
    END_ASK,
    BEGIN,
    PULL,
    PUT_BACK,
    WITHDRAW,
    END,
    REARM,
    STOP,
    REGISTER,
    ANSWER,
    KEEP,
    ISOLATE_BLOCK,
    UNISOLATE_BLOCK,
    SET_TYPE,
    ROTATE_LIST,
    COMMAND,
    RELEASE,
    WALK,
    ANSWER_ASK,
    SET_ASKING,
) = range(len(STEP_NAMES))
N_KINDS = len(STEP_NAMES)
