"""Errors and file names as one line of plain text, without control characters."""


def reason(error: BaseException) -> str:
    """One sentence on what went wrong: the first line of the message of `error`."""
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).strip()
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return "out of memory."
    line = text.splitlines()[0].strip() if text else type(error).__name__
    return line if line.endswith((".", "!", "?")) else f"{line}."


def printable(text: str) -> str:
    """`text` with control characters and undecodable bytes written as escapes: `\\x1b`, `\\n`, `\\udcff`."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
