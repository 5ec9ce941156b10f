"""Errors and file names as one line of plain text, without control characters."""

MAX_REASON = 1000
"""Characters of a sentence on an error, which may repeat what somebody sent."""


def reason(error: BaseException) -> str:
    """One sentence on what went wrong: the first line of the message of `error`, and after a colon the next."""
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).strip()
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return "out of memory."
    first, *others = (line.strip() for line in text.splitlines() or [type(error).__name__])
    line = f"{first} {others[0]}" if first.endswith(":") and others else first
    line = line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]}..."
    return line if line.endswith((".", "!", "?")) else f"{line}."


def printable(text: str) -> str:
    """`text` with control characters and undecodable bytes written as escapes: `\\x1b`, `\\n`, `\\udcff`."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
